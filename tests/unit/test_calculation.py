"""Calculation: which number a reply ends on, what it is worth, and what calls of the calculator add."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.calculation import calculation_accuracy, calculation_reward, last_number, tool_success

RIGHT = {
    "as it is": ("72", "72"),
    "a full stop": ("She sold 72.", "72"),
    "a unit": ("That makes 72 clips", "72"),
    "a unit with a digit": ("It is 72 m^2 of CO2", "72"),
    "the last of several": ("48 and 24 make 72", "72"),
    "the result of an equation": ("48 + 48/2 = 72", "72"),
    "in bold": ("**72**", "72"),
    "in LaTeX": (r"\boxed{72}", "72"),
    "thousands": ("1,234", "1234"),
    "thousands in the answer": ("1234.0", "1,234"),
    "millions and cents": ("$1,234,567.80", "1234567.8"),
    "dollars": ("$5.5", "$5.50"),
    "minus dollars": ("-$5.50", "-5.5"),
    "dollars minus": ("US$-5.50", "-5.5"),
    "a sign of print": ("−3", "-3"),
    "a sign in Chinese": ("答案是-3。", "-3"),
    "a subtraction": ("10-3", "3"),
    "a range": ("10–12", "12"),
    "a fraction": ("3/4", "0.75"),
    "a fraction in the answer": ("0.75", "3/4"),
    "a mixed number": ("1 1/2 cups", "1.5"),
    "a mixed number in one sign": ("1½", "1.5"),
    "a negative mixed number": ("-1 1/2", "-1.5"),
    "a number before a fraction": ("of -10 20/5", "4"),
    "a number before a mixed number": ("2 10 1/2", "10.5"),
    "without a zero": (".5", "1/2"),
    "an exponent": ("2e3", "2000"),
    "full-width": ("共７２．５個", "72.5"),
    "percent for percent": ("50%", "50 %"),
    "percent as a unit": ("50%", "50"),
    "percent left out": ("50", "50%"),
    "hundredths for percent": ("0.5", "50%"),
    "percent for hundredths": ("50%", "0.5"),
    "percent in words": ("0.5", "50 percent"),
    "a fraction of LaTeX": (r"The answer is \boxed{\frac{3}{4}}", "0.75"),
    "a fraction of LaTeX in the answer": ("-0.5", r"-\dfrac12"),
    "a mixed number of LaTeX": (r"$7\frac{1}{2}$ cups", "7.5"),
    "a negative fraction in one sign": ("-½ cup", "-0.5"),
    "thirds": ("1⅔", "5/3"),
    "a fraction slash": ("3⁄8", "⅜"),
    "thousands of LaTeX": (r"\boxed{1{,}234}", "1234"),
    "thousands of LaTeX's other kinds": (r"12\,345\,678 = 12,\!345,\!678", "12345678"),
    "thousands with no-break spaces": ("72\u00a0000", "72000"),
    "thousands with narrow ones in the answer": ("1234567 m", "1\u202f234\u2009567"),
    "a power of ten": (r"$1.5 \times 10^{3}$ m", "1500"),
    "a minus on its own": (r"x = - \frac{1}{2}", "-0.5"),
    "a unit of LaTeX": ("72 km", r"72 \text{ km}^2"),
    "degrees": (r"45^{\circ}", "45°"),
    "an escaped percent sign": (r"$50\%$", r"50\%"),
    "an equation": (r"\(x = 3\)", "$x = 3$"),
    "behind GSM8K's mark": ("72", "48 / 2 = 24 and so on\n#### 72"),
    "a price in LaTeX": ("5.50 dollars", r"\$5.50"),
    "Arabic digits": ("٧٢", "72"),
    "a zero-width character": ("7\u200b2", "72"),
    "a list": ("1, 2, 3", "3"),
    "a unit with a negative exponent": (r"9.8 m s^{-2}.", "9.8"),
    "a unit with one of print": ("9.8 m s⁻²", "9.8"),
    "a unit with one in brackets": ("9.8 m s^(-2)", "9.8"),
    "a subtraction from a power": ("x^2-3", "3"),
    "a hyphen that does not break": ("x = \u20115", "-5"),
    "a raised minus": ("⁻5", "-5"),
    "Arabic separators": ("١٬٢٣٤٫٥", "1234.5"),
    "Arabic percent": ("٥٠٪", "50%"),
    "a power of ten of print": ("3 × 10⁻⁸", "3e-8"),
    "a power of ten with a letter": ("3x10^8", "3e8"),
    "a power of ten in Python": ("1.5*10**3", "1500"),
    "a decimal comma": ("3,14", "3.14"),
    "a decimal comma behind zero": ("0,125", "0.125"),
    "a decimal comma and four digits": ("1,2345", "1.2345"),
    "a decimal comma of LaTeX": (r"\boxed{0{,}5}", "0{,}5"),
    "a decimal comma behind thousands": ("1.234,56", "1234.56"),
    "behind three dots": ("The answer is...42", "42"),
    "between Markdown's lines": ("It is __42__", "42"),
    "a minus between Markdown's lines": ("_-5_", "-5"),
    "kilograms in Chinese": ("共5千克", "5千克"),
    "coins": ("She has 5 quarters", "5"),
    "euros": ("5", "5 €"),
    "a code of a currency": ("5", "USD 5"),
    "won": ("₩5,000", "5,000원"),
    "a unit without a space": ("72", "72km"),
    "a unit of one letter": ("42", "42 Ω"),
    "a unit with a Greek letter": ("42", "42 µm"),
    "degrees in one sign": ("42", "42℃"),
    "a unit with a plain exponent": ("42", "42 cm2"),
    "a number in brackets": ("-5", "（-5）"),
    "a label in Chinese": ("-5", "答案：-5"),
    "thousands with plain spaces and nothing else": ("1234567", "1 234 567"),
    "rounded in the seventh digit": ("0.33333333", "1/3"),
    "zero": ("0.0", "0"),
    "an answer that is a number": ("7", 7),
}


@pytest.mark.parametrize(("text", "answer"), RIGHT.values(), ids=RIGHT)
def test_what_is_right(text, answer):
    """However it is written."""
    assert calculation_accuracy([text], [answer]) == [1.0]


WRONG = {
    "another number": ("73", "72"),
    "the number, and then another": ("72, which is 24 more than 48", "72"),
    "the other sign": ("-72", "72"),
    "rounded too far": ("0.333", "1/3"),
    "the first part of a larger number": ("72,000", "72"),
    "digits of a word": ("CO72", "72"),
    "another percentage": ("0.5%", "50%"),
    "a hundredth": ("0.72", "72"),
    "a hundredfold percentage": ("7200%", "72%"),
    "not zero": ("0.0000001", "0"),
    "a fraction of nothing": ("72/0", "1"),
    "too large for a float": ("9" * 400, "72"),
    "words": ("seventy-two", "72"),
    "nothing": ("", "72"),
    "the denominator": ("The answer is 2", r"\frac{1}{2}"),
    "under a root": (r"\boxed{\sqrt{2}}", "2"),
    "the base of a power": ("10^6", "10"),
    "times pi": (r"3\pi", "3"),
    "over nothing": ("72/0", "72"),
    "an exponent of a unit": (r"9.8 m s^{-2}", "-2"),
    "a power of ten": ("10^{-3}", "-3"),
    "the base of a letter": ("2^n", "2"),
    "the end of a list without spaces": ("1,2,3", "3"),
    "a point": ("(3,14)", "3.14"),
    "the end of Indian thousands": ("12,34,567", "567"),
    "the end of thousands with points": ("1.234.567", "567"),
    "a negative denominator": ("3/-4", "-4"),
    "a negative denominator of LaTeX": (r"\frac{1}{-2}", "-2"),
    "millions": ("It costs **5** million", "5"),
    "Chinese tens of thousands": ("共5万", "5"),
    "three dots for a point": ("...42", "0.42"),
    "an index of LaTeX": ("CO$_2$", "2"),
}


@pytest.mark.parametrize(("text", "answer"), WRONG.values(), ids=WRONG)
def test_what_is_wrong(text, answer):
    """And raises nothing."""
    assert calculation_accuracy([text], [answer]) == [0.0]


def turns(*results, said="72"):
    """Return an episode as TRL has it: calls with their results (None: cut off before it), and then the answer."""
    messages = []
    for result in results:
        call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "48 + 24"}}}
        messages += [{"role": "assistant", "content": "I call 1", "tool_calls": [call]}]
        messages += [{"role": "tool", "name": "calculator", "content": result}] if result is not None else []
    return [*messages, {"role": "assistant", "content": said}]


FAILED = str({"error": "division by zero"})
EPISODES = {
    "right with a call": (turns("72"), 1.1, 1),
    "right with two calls": (turns("48", "72"), 1.1, 1),
    "right without a call": (turns(), 0.8, 0),
    "right in plain text": ("72", 0.8, 0),
    "right after a call that failed": (turns(FAILED, "72"), 1.0, 0),
    "wrong with a call": (turns("72", said="27"), 0.1, 1),
    "wrong without a call": (turns(said="27"), -0.2, 0),
    "wrong with a call that failed": (turns(FAILED, said="27"), -0.1, 0),
    "no more than three failures count": (turns(*[FAILED] * 9, said="27"), -0.3, 0),
    "cut off at the call": (turns(None)[:-1], 0.0, 0),
    "the answer in the result alone": (turns("72")[:-1], 0.1, 1),
    "nothing": ([], -0.2, 0),
}


@pytest.mark.parametrize(("completion", "score", "success"), EPISODES.values(), ids=EPISODES)
def test_what_an_episode_is_worth(completion, score, success):
    """The answer above all; then that the tool was used, and well."""
    assert calculation_reward([completion], ["72"]) == [pytest.approx(score)]
    assert tool_success([completion]) == [success]


def test_a_row_that_needs_no_tool_pays_the_same_without_one():
    """Each reply meets its own row's answer and need; the options move all of it."""
    replies = [turns(), turns(), turns("7", said="8")]
    assert calculation_reward(replies, ["72", "72", "8"], needs_tool=[False, True, False]) == pytest.approx(
        [1, 0.8, 1.1]
    )
    options = {"right": 2, "called": 0.5, "failed": -0.3, "without_tool": -0.4, "tolerance": 0.5}
    replies = [turns(said="50"), turns("7", said="9"), turns(FAILED, said="9")]
    assert calculation_reward(replies, ["72"] * 3, **options) == pytest.approx([1.6, 0.5, -0.3])


IMPOSSIBLE = {
    "an answer without a number": (
        {"answer": ["seventy"]},
        "answer is 'seventy'",
    ),
    "a root": ({"answer": [r"\sqrt{2}"]}, "answer is "),
    "a sum": ({"answer": ["2 + 3"]}, r"answer is '2 \+ 3'"),
    "two numbers": ({"answer": ["(1, 2)"]}, r"answer is '\(1, 2\)'"),
    "a number of another size": ({"answer": ["5 million"]}, "answer is '5 million'"),
    "a number and a half": ({"answer": ["3 and a half"]}, "answer is '3 and a half'"),
    "a decimal comma": ({"answer": ["0,5"]}, "answer is '0,5'"),
    "three digits behind a decimal comma": ({"answer": ["0,125"]}, "answer is '0,125'"),
    "quarters": ({"answer": ["3 quarters"]}, "answer is '3 quarters'"),
    "a product": ({"answer": ["2xy"]}, "answer is '2xy'"),
    "a word in capitals": ({"answer": ["THE 5"]}, "answer is 'THE 5'"),
    "two numbers with a space": ({"answer": ["2 3"]}, "answer is '2 3'"),
    "a fraction of LaTeX with a root": ({"answer": [r"\frac{\sqrt{3}}{2}"]}, "answer is "),
    "a list of answers": ({"answer": [["72"]]}, r"answer is \['72'\]"),
    "an answer without an end": ({"answer": ["1e999"]}, "answer is '1e999'"),
    "a bonus for failing": ({"answer": ["1"], "failed": 0.1}, "failed 0.1"),
    "a bonus for not calling": ({"answer": ["1"], "without_tool": 0.1}, "without_tool 0.1"),
    "a price for calling": ({"answer": ["1"], "called": -1}, "called -1"),
    "a negative tolerance": ({"answer": ["1"], "tolerance": -1}, "tolerance -1"),
    "calling pays like being right": ({"answer": ["1"], "called": 0.7}, "called below right 1.0"),
    "failing eats the reward": ({"answer": ["1"], "failed": -0.4}, "called below right"),
    "fewer answers than replies": ({"answer": []}, "shorter"),
}


@pytest.mark.parametrize(("given", "said"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_is_named(given, said):
    """The option or the row's value; by the measure too."""
    with pytest.raises(ValueError, match=said):
        calculation_reward(["1"], **given)
    with pytest.raises(ValueError, match="answer is 'x'"):
        calculation_accuracy([""], ["x"])


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_row_without_an_answer_is_a_failed_rating(missing):
    """The others of its batch keep their own; nothing ends the run."""
    assert calculation_reward(["1", "2"], [missing, "2"], needs_tool=[False, False]) == [None, 1]
    assert calculation_accuracy(["1", "2"], ["1", missing]) == [1, None]


TEXT = st.text() | st.text("0123456789.,/-−$%½eE ^x\n", max_size=60)


@given(text=TEXT, number=st.decimals(-(10**9), 10**9, places=3))
@settings(deadline=None, database=None, max_examples=500, derandomize=True)
def test_any_text_scores_and_any_number_is_read_back(text, number):
    """A float within the range, in chat as in plain text; and the number behind the text counts."""
    plain, in_chat = calculation_reward([text, [{"role": "assistant", "content": text}]], ["72", "72"])
    assert plain == in_chat and type(plain) is float and math.isfinite(plain) and -0.3 <= plain <= 1.1
    assert last_number(f"{text} = {number}").value == last_number(f"{text} = {number:,}.").value == float(number)
