"""Pairs of equal answers, and near misses of the same kinds."""

# ruff: noqa: RUF001 - signs of other scripts are intended

import signal
import threading
import time
import warnings

import pytest

from rlora.rewards.equivalence import grade, math_answer
from rlora.rewards.math import equivalence

RIGHT = {
    "numbers": r"""
        5 | 5.0
        5 | 5.
        0.5 | .5
        1/2 | 0.5
        1/2 | \frac12
        \frac{1}{2} | 2/4
        1000 | 1,000
        1000 | 1{,}000
        1000 | 1\,000
        1000 | 1 000
        1234567 | 1,\!234,\!567
        -3 | −3
        3.5 | 3\frac{1}{2}
        3.5 | 3 1/2
        -3.5 | -3\frac12
        7/2 | 3½
        1500 | 1.5e3
        1500 | 1.5 \times 10^{3}
        1500 | 1.5 x 10^3
        0.0000672 | 6.72 \times 10^{-5}
        1/3 | 0.\overline{3}
        1/6 | 0.1\overline{6}
        42 | ４２
        42 | ٤٢
        42 | ४२
        42 | 42\
        42 | 42\\
        42 | +42
        10 | \$10
        5.50 | \$5.50
        5 | \text{5}
        1000 | 10^3
        120 | 5!
        120 | \binom{10}{3}
        8 | 2^3
        10 | (9+1)
    """,
    "percent": r"""
        50\% | 1/2
        50\% | 0.5
        28\% | 28 percent
        28\% | 28\text{ percent}
        0.28 | 28\%
        12.5\% | \frac{1}{8}
    """,
    "closed forms": r"""
        2\sqrt3 | \sqrt{12}
        \frac{\sqrt{3}}{3} | \frac{1}{\sqrt 3}
        \sqrt2 | sqrt(2)
        \sqrt{2} | 2^{1/2}
        \sqrt[3]{8} | 2
        \sqrt[3]{-8} | -2
        \sqrt{3+2\sqrt2} | 1+\sqrt2
        900\pi | 900π
        \frac{9}{4}\pi | 9\pi/4
        \log_2 8 | 3
        \log_{10} 2 | \log 2
        \ln e^2 | 2
        \sin 30^\circ | \frac12
        \cos\frac{\pi}{3} | 1/2
        e^{2} | \exp(2)
        3+4i | 4i+3
        \frac{1}{1+i} | \frac{1-i}{2}
        i^2 | -1
        |-5| | 5
        \lfloor 3.7 \rfloor | 3
        \frac{5\sqrt{42}}{27} | \frac{10\sqrt{10.5}}{27}
    """,
    "unknowns": r"""
        (x-2)(x+2) | x^2-4
        1 + x | x + 1
        x^2+2x+1 | (x+1)^2
        \frac{x+2}{7} | \frac{x}{7}+\frac{2}{7}
        \tan^2(y)+1 | \sec^2(y)
        2\sin b\cos a | 2\cos(a)\sin(b)
        \sin 2x | 2 \sin x \cos x
        x^{2/3} | \sqrt[3]{x^2}
        x**2 + 1 | x^2+1
        \sqrt{ab} | \sqrt{a}\sqrt{b}
        \frac{n(n+1)}{2} | \frac{n^2+n}{2}
        \ln\frac{x}{y} | \ln x - \ln y
        \cot x | \frac{\cos x}{\sin x}
        \sum_{k=0}^{n} F_k F_{n-k} | \sum_{k=0}^{n} F_{n-k} F_k
        2a_1 + a_2 | a_2 + 2a_{1}
        \alpha+\beta | β+α
    """,
    "relations": r"""
        x=5 | 5
        5 | x = 5
        k=1 | 1
        y = 2x + 3 | 2x + 3
        f(x)=x^2 | x^2
        5 | x \approx 5
        11 | x = 5+5+1 = 11
        1/3 | x = 1/3 \approx 0.333
        2x+4y-3=0 | y=-\frac{1}{2}x+\frac{3}{4}
        x^2/4 + y^2/3 = 1 | x^2/16 + y^2/12 = 1/4
        Eq(x**2/4 + y**2/3, 1) | \frac{x^2}{4}+\frac{y^2}{3} = 1
        x \ge 5 | x >= 5
        x \leq 5 | 5 \geq x
        x < 1 | -x > -1
        x \ne 3 | x != 3
        (p,q)=(3,2) | (3,2)
        2 < x < 5 | 5 > x > 2
        V_1:V_2=11:21 | 11:21
        2:3 | 4:6
    """,
    "intervals": r"""
        x \in [-2,7] | [-2,7]
        [-2,7] | -2 \le x \le 7
        -2 \le x \le 7 | x \in [-2,7]
        (-\infty, 3] | x \le 3
        (-\infty,2)\cup(3,\infty) | (3,\infty) \cup (-\infty,2)
        (-\infty,2)\cup(3,\infty) | x<2 \text{ or } x>3
        (0,9) \cup (9,36) | (9,36)\cup(0,9)
        [0,\infty) | [0,+\infty)
        (2,\infty) | \{x : x > 2\}
        \left(\frac{3}{5},\frac{8}{3}\right] | (0.6, 8/3]
    """,
    "sets and lists": r"""
        1,-2 | -2, 1
        \{1,2\} | \{2,1\}
        5, 7 | 5 \text{ and } 7
        5 and 7 | 7,5
        1,2,3 | \{1,2,3\}
        \{5\} | 5
        \pm 3 | 3, -3
        1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
        \{1\pm\sqrt{5},-2\} | -2, 1+\sqrt5, 1-\sqrt5
        (1,2),(3,4) | (3,4),(1,2)
        (3, \frac{\pi}{2}) | \left(3,\frac\pi2\right)
        (1,2) | (1, 2)
        (1,2,3) | \langle 1,2,3 \rangle
        x=1, y=2 | y=2, x=1
        x=1, y=2 | 1, 2
        \emptyset | \{\}
        \emptyset | \text{no solution}
        3, 5, 7 | 3,5, and 7
    """,
    "matrices": r"""
        \begin{pmatrix}0&1\\1&0\end{pmatrix} | [[0,1],[1,0]]
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix}1&2\\3&4\end{bmatrix}
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \left[\begin{array}{cc}1 & 2 \\ 3 & 4\end{array}\right]
        \begin{pmatrix}1/2\\3\end{pmatrix} | \begin{pmatrix}0.5\\3\end{pmatrix}
        \begin{pmatrix}1\\2\\3\end{pmatrix} | (1,2,3)
        \begin{pmatrix}6\\8\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}5\\6\end{pmatrix}
    """,
    "units": r"""
        15 | 15\text{ cm}
        15 | 15 cm^2
        15\text{ cm}^2 | 15
        15\mbox{ cm}^2 | 15\text{ square centimeters}
        864 \mbox{ inches}^2 | 864 \text{ in}^2
        125 \text{ miles} | 125\textnormal{ miles}
        10\text{ units} | 10
        90^\circ | 90
        90 | 90^\circ
        90^\circ | 90\text{ degrees}
        60\text{ mph} | 60 \text{ miles per hour}
        15\text{ dollars} | \$15
        36\text{ students} | 36\text{ people}
        5.4 \text{ cents} | 5.4
        3:30 | 3:30\text{ PM}
    """,
    "bases": r"""
        52_8 | 52_8
        4210_{5} | 4210_5
        204_5 | 204
        1010_{2} | 1010_2
    """,
    "words": r"""
        \text{east} | East
        \text{Evelyn} | evelyn
        \text{(C)} | C
        B | (B)
        B | B. 42
        \text{C} | \textbf{(C)}
        \text{even} | even
        \text{True} | true
        René | Rene
        \text{no solution} | \text{No solutions}
        x^5 | x^{5}
    """,
}
WRONG = {
    "numbers": r"""
        5 | 5.01
        1/3 | 0.333333
        1/3 | 0.3333333333
        0.333333 | 1/3
        2/3 | 0.67
        1000 | 1,00
        3.5 | 3\frac{1}{3}
        3.5 | \frac{31}{2}
        1500 | 1.5e4
        42 | ٤٣
        32349 | 32, 349
        7 | 1,2,3,4,5,6,7
        7 | 7,8
        9\pi | 28.274309999999993
        900\pi | 2827.43
        4 | 4\sqrt{2}
        \pi | 3.14159265358979
        1 | 1+10^{-60}
        1 | 1+e^{-1000}
        \pi | \pi + 10^{-300}
        13 | 1 3
    """,
    "percent": r"""
        50 | 50\%
        50\% | 50
        28\% | 0.028
        50\% | 0.5\%
    """,
    "closed forms": r"""
        2\sqrt3 | \sqrt{13}
        \sqrt[3]{-8} | 2
        \log_2 8 | \log_8 2
        3+4i | 3-4i
        e^{\pi\sqrt{163}} | 262537412640768744
        \sin 30 | \frac12
        5050 | \sum_{k=1}^{100} k
    """,
    "unknowns": r"""
        x^2-4 | (x-2)^2
        x+2n+1 | x+1
        (a+5)(b+2) | (+5)(b+2)
        x | y
        f(x) | f(y)
        x | \sqrt{x^2}
        a_1 | a_2
        \sum_{k=0}^{n-1} F_k F_{n-k-1} | \sum_{k=0}^{n-2} F_k F_{n-k-2}
        x^2 | x_2
        2x | x2x
    """,
    "relations": r"""
        x=5 | y=5
        x=5 | 2x=11
        5 | 2x=5
        x=5 | 2x=10
        7 = 11a+c | 11a+c
        a+3z=0 | 0
        2x+z=1 | 1
        Eq(x**2/4 + y**2/3, 1) | Eq(x**2/16 + y**2/12, 1)
        x > 5 | x < 5
        x \ge 5 | x > 5
        x<1 | x > -1
        2 < x < 3 | x^2-5x+6<0
        f(2) < f(1) < f(4) | f(1) < f(2) < f(4)
        2:3 | 3:2
        12:00 | 1:00
        5x - 7y + 11z + 4 = 0 | x + y - z + 2 = 0
    """,
    "intervals": r"""
        [0,1) | [0,1]
        (0,9) | [0,9)
        1 | -[0,1)
        [-3,2] | (-\infty,-3]\cup[2,\infty)
        (-\infty,2)\cup(3,\infty) | (-\infty,2)\cup(4,\infty)
        (-\infty,2)\cup(3,\infty) | (-\infty,2)
        x \in [-2,7] | -2 < x < 7
        (-\infty,2)\cup(3,\infty) | (-\infty,\infty)
    """,
    "sets and lists": r"""
        (1,2) | \{1,2\}
        \{1,2\} | (1,2)
        (1,2) | (2,1)
        (1,2) | [1,2]
        1,2 | 1
        1 | 1,2
        \pm 2021 | 2021
        2021 | \pm 2021
        2,2,3 | 2,3
        6,-2 | 6
        (1,2),(3,4) | (1,4),(3,2)
        (3,1) | 1,3
        x=1, y=2 | x=2, y=1
        \{1,2,3\} | \{1,2\}
        \emptyset | 0
    """,
    "matrices": r"""
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&2\\3&5\end{pmatrix}
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | [[1,3],[2,4]]
        \begin{pmatrix}1&2\\3&4\end{pmatrix} | (1,2,3,4)
        \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
    """,
    "units": r"""
        864 \mbox{ inches}^2 | 864 \mbox{ inches}^4
        15\text{ cm} | 15\text{ m}
        15\text{ cm}^2 | 15\text{ cm}
        15\text{ cm} | 16
        60\text{ mph} | 60\text{ km/h}
        \$15 | 15\text{ euros}
        10\text{ units} | 10\text{ square units}
        3:30\text{ AM} | 3:30\text{ PM}
    """,
    "bases": r"""
        52_8 | 52_5
        52_8 | 53_8
        52 | 52_8
        42 | 52_8
        204_5 | 205
        1112112_3 | 1112122_3
    """,
    "words": r"""
        \text{east} | west
        \text{Evelyn} | Briana
        B | C
        \text{even} | neve
        42 | \text{forty-two}
        d | \text{E}
        \text{ellipse} | \text{eclipse}
    """,
}


def rows(tables: dict[str, str]) -> list[object]:
    return [
        pytest.param(*(side.strip() for side in line.split(" | ")), id=f"{name}: {line.strip()}")
        for name, table in tables.items()
        for line in table.strip().splitlines()
    ]


@pytest.mark.parametrize(("gold", "prediction"), rows(RIGHT))
def test_equal_answers_are_correct_bare_and_boxed(gold: str, prediction: str) -> None:
    assert grade(gold, rf"Some words first. \boxed{{{prediction}}}") == "correct"
    assert grade(rf"\boxed{{{gold}}}", rf"\boxed{{{prediction}}}") == "correct"


@pytest.mark.parametrize(("gold", "prediction"), rows(WRONG))
def test_near_misses_are_not_correct(gold: str, prediction: str) -> None:
    assert grade(gold, rf"Some words first. \boxed{{{prediction}}}") != "correct"
    assert grade(gold, prediction) != "correct"
    assert grade(gold, f"The answer is ${prediction}$.") != "correct"


def test_a_gold_may_be_a_number() -> None:
    assert grade(42, r"\boxed{42}") == grade(0.5, "Answer: 1/2") == math_answer("#### 42", 42) == "correct"
    assert grade(42, r"\boxed{43}") == "wrong"


def test_a_prediction_without_an_answer_is_unparsable() -> None:
    assert grade(42, "") == grade(42, r"\boxed{}") == grade(42, r"\boxed{42") == "unparsable"


def test_answers_over_the_bounds_are_unparsable() -> None:
    for answer in ("9" * 1001, "{" * 50 + "1" + "}" * 50, "9^{9^{9^{9}}}", "(10^9)!", "1e999999999", "1+" * 2000 + "1"):
        assert grade(42, rf"\boxed{{{answer}}}") in ("unparsable", "wrong"), answer[:20]


def test_a_long_float_equals_the_value_that_it_rounds() -> None:
    assert grade(r"\frac{1}{12}", "$0.0833333333333333$") == grade("3.33333333", r"\boxed{\frac{10}{3}}") == "correct"
    assert grade(r"\frac{1}{12}", "$0.0833333333333433$") == "wrong"


def test_the_deadline_gives_a_status_and_restores_the_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(*_: object) -> bool:
        try:
            while True:
                time.sleep(0.01)
        except Exception:  # as a library in between might do
            return True

    monkeypatch.setattr(equivalence, "equal", stuck)
    monkeypatch.setattr(equivalence, "SECONDS", 0.1)
    handler = signal.getsignal(signal.SIGALRM)
    started = time.monotonic()
    assert grade("x", r"\boxed{y}") == "timeout"
    assert time.monotonic() - started < 1
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_grading_works_on_other_threads() -> None:
    statuses: list[str] = []
    thread = threading.Thread(target=lambda: statuses.append(grade("x+1", r"\boxed{1+x}")))
    thread.start()
    thread.join()
    assert statuses == ["correct"]


def test_grading_gives_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grade(r"\frac{\pi}{2}", r"\boxed{\arcsin 1}") == "correct"
