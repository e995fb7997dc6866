"""Kinds of answers that graders get wrong, with near misses: names on the left of a relation, solution sets, text around
a value, text after a number."""

# ruff: noqa: E501 - one pair per line

from contextlib import closing
from typing import Any

import pytest
from conftest import case

from rlora.rewards.equivalence import grade
from rlora.rewards.math import values
from rlora.scoring.pool import Pool
from rlora.scoring.worker import Setup

RIGHT = r"""
    (x,y)=(2,1) | x=2, y=1
    (x,y)=(2,1) | y=1, x=2
    (x,y)=(2,1) | (y,x)=(1,2)
    (2,1) | (x,y)=(2,1)
    x = 7 | 7 = x
    AB = 5 | 5
    5 | AB = 5
    30^\circ | \angle ABC = 30^\circ
    \frac13 | P(A \cap B) = \frac13
    \frac13 | P(X = 2) = \frac13
    5 | f(2) = 5
    12 | \text{Area} = 12
    x^2 | f(x) = x^2
    2x | f'(x) = 2x
    2x | \frac{dy}{dx} = 2x
    f'(x)=2x | y' = 2x
    \frac{x-1}{2} | f^{-1}(x) = \frac{x-1}{2}
    2n | a_n = 2n
    a_n = 2n | a_k = 2k
    S_{\max} = 12 | S = 12
    x_{1} = 3, x_2 = 4 | x_1=3, x_2=4
    3, 4 | x_1 = 3, x_2 = 4
    x \ne 2 | (-\infty,2)\cup(2,\infty)
    x \neq \pm 1 | (-\infty,-1)\cup(-1,1)\cup(1,\infty)
    \mathbb{R} \setminus \{2\} | x \ne 2
    \mathbb{R} - \{2,3\} | x \neq 2 \text{ and } x \neq 3
    x \in \mathbb{R}, x \ne 2 | (-\infty,2)\cup(2,\infty)
    \mathbb{R} | (-\infty, \infty)
    \text{all real numbers} | x \in \mathbb{R}
    \mathbb{R}^+ | (0,\infty)
    x > 0 | \mathbb{R}^+
    (-\infty,-2]\cup\{1\} | a \le -2 \text{ or } a=1
    C_5^2 | 10
    C_{10}^{3} | 120
    A_5^2 | 20
    P_5^2 | 20
    {}_{10}C_3 | \binom{10}{3}
    {}^{10}C_3 | 120
    \binom{n}{2} | \frac{n(n-1)}{2}
    n! | n \cdot (n-1)!
    \frac{(2n)!}{n!n!} | \binom{2n}{n}
    8!! | 384
    7 | \text{approximately } 7
    7 | \text{exactly } 7
    7 | 7 \text{ apples}
    7 | \text{7 apples}
    7.5 | \text{7.5 km}
    120 | \text{C}_{10}^3
    42 | \text{USD } 42
    42 | 42 \text{ USD}
    42 | US\$42
    42 | Rs 42
    42 | 42元
    42 | ₹42
    42000 | \$42\text{k}
    42000000 | \$42\text{ million}
    42000000 | \$42\text{M}
    0.07 | 7 \text{ per cent}
    700000 | 7 \text{ lakh}
    30000 | 3万
    90^\circ | 90^o
    90 | 90^{\circ}
    90^\circ | 90º
    90^\circ | 90 \text{ degrees}
    \frac34 | \nicefrac{3}{4}
    \frac34 | \sfrac34
    5 \text{ cm} | \SI{5}{cm}
    5 \text{ cm} | \qty{5}{\centi\meter}
    5 \text{ m/s} | \SI{5}{\meter\per\second}
    1500 | \num{1.5e3}
    1/3 | 0.\dot{3}
    1/7 | 0.\dot{1}4285\dot{7}
    1+i\sqrt3 | 2\operatorname{cis}(60^\circ)
    2e^{i\pi/3} | 2\,\mathrm{cis}\,\frac{\pi}{3}
    |x| | \sqrt{x^2}
    |x-5| | |5-x|
    |m-n| | |n-m|
    \frac{1}{2} | Rational(1,2)
    \sqrt{2} | math.sqrt(2)
    x^2+1 | x**2 + 1
    f(x)=\begin{cases} x & x>0 \\ -x & x \le 0 \end{cases} | \begin{cases} -x & \text{if } x \le 0 \\ x & \text{if } x > 0 \end{cases}
    x=3,y=-1 | \begin{cases} x=3 \\ y=-1 \end{cases}
    \begin{cases} x=3 \\ y=-1 \end{cases} | (x,y) = (3,-1)
    x = 2k\pi, k \in \mathbb{Z} | x = 2n\pi \text{ for integer } n
    x = 2k\pi, k \in \mathbb{Z} | x = 2k\pi
    k\pi | k\pi, k \in \mathbb Z
    x+C | x+C \text{ where } C \text{ is a constant}
    f(n) = 2n | f(n) = 2n \text{ for all } n
    1,1,2 | 2,1,1
    \{1,2\} | 1,2,2
    (1,2,2) | (1,2,2)
    1024 | 2<sup>10</sup>
    x_1 | x<sub>1</sub>
    [1,2) | 1 \le x < 2
    (2,4) | 2 < x < 4
    (1,100) | (1, 100)
    (1,000) | 1000
    25^\circ C | 25^\circ\text{C}
    25 | 25^\circ\text{C}
    y = 2x+1 | 2x - y + 1 = 0
    (x-1)^2+y^2=4 | x^2 - 2x + y^2 = 3
    x \ge 3 | [3,\infty)
    \sin^2 x | 1-\cos^2 x
    \log_2 3 | \frac{\ln 3}{\ln 2}
    \ln(x^2) | 2\ln|x|
    \frac{1}{n+1} | \frac{n!}{(n+1)!}
    (-1)^n n | n(-1)^n
    \frac{(n+2)(n+1)}{2} | \binom{n+2}{2}
    \text{red, blue} | \text{blue and red}
    \text{no solution} | \varnothing
    p(x) = x^2+1 | p(x)=1+x^2
    x^2+1 | p(x)=x^2+1
    v(t) = 3t | 3t
    \sqrt{3}/2 | sqrt(3)/2
    [1,2] | Interval(1, 2)
    (1,2) | Interval.open(1, 2)
    (-\infty, 2) | Interval.open(-oo, 2)
    \{1,2\} | FiniteSet(1, 2)
    \{1,2\} | {1, 2}
    (-\infty,-1)\cup(1,\infty) | Union(Interval.open(-oo, -1), Interval.open(1, oo))
    \binom{5}{2} | binomial(5, 2)
    120 | factorial(5)
    2 | log(100)
    3 | log(8, 2)
    \log_2 8 | log(8)/log(2)
    \lceil x \rceil | ceiling(x)
    \frac{1}{2}+\sqrt3 | Rational(1, 2) + sqrt(3)
    x^{1/2} | x^(1/2)
    x^{1/2} | x**(1/2)
    e^2 | E**2
    2i | 2*I
    \begin{pmatrix}1&2\\3&4\end{pmatrix} | Matrix([[1, 2], [3, 4]])
    \pi/2 | pi/2
    |x-1| | abs(x - 1)
    x^2 | pow(x, 2)
    x=2 | Eq(x, 2)
    2 | x == 2
    \text{True} | True
    3\pi | 3*math.pi
    3\pi | 3*np.pi
    5 \text{ m/s}^2 | 5 \text{ m}/\text{s}^2
    5 \text{ m/s}^2 | 5 \, \mathrm{m/s^2}
    5 \text{ cm}^2 | 5 \text{ square centimeters}
    12 \text{ cm}^3 | 12\ \mathrm{cm}^3
    3 \times 10^8 \text{ m/s} | 3\times10^8\,\mathrm{m\,s^{-1}}
    60 \text{ mph} | 60 \text{ miles per hour}
    5 | 5 \text{ units}^2
    45^\circ | 45 \text{ deg}
    45^\circ | \ang{45}
    45^\circ | 45\degree
    45^\circ | 45{}^\circ
    45^\circ | 45^\text{o}
    45^\circ | 45^{\mathrm{o}}
    45^\circ | 45°
    0.1\overline{6} | \frac16
    0.\overline{36} | 4/11
    0.1\dot{6} | 1/6
    0.\dot3 | 1/3
    \frac{\sqrt2}{2} | \cos 45^\circ
    -\frac12 | \cos(120°)
    1+\sqrt2 | \sqrt{3+2\sqrt{2}}
    \frac{1}{4}(\sqrt5-1) | \sin 18^\circ
    \log_{10}(x) | \log x
    \ln 2 | \log_e 2
    2^{10} | 1024
    x^3-1 | (x-1)(x^2+x+1)
    \sec^2 x - 1 | \tan^2 x
    \frac{e^x-e^{-x}}{2} | \sinh x
    \arctan 1 | \frac{\pi}{4}
    \tan^{-1} 1 | \frac{\pi}{4}
    \sqrt[3]{x^2} | x^{2/3}
    n(n-1)(n-2)/6 | \binom{n}{3}
    \frac{n!}{k!(n-k)!} | C(n,k)
    \frac{n!}{k!(n-k)!} | {n \choose k}
    C_{n}^{k} | \binom{n}{k}
    2^{n}n! | (2n)!!
    m_{\max} = 5 | 5
    x_{\text{max}}=5 | 5
    V_{\max} = 5 | V_{\text{max}} = 5
    \lambda = 5 | 5
    \theta = 30^\circ | 30^\circ
    \angle A = 30^\circ | 30
    f(x)=2x \text{ for all } x | 2x
    f(x)=2x, x \in \mathbb{R} | f(x) = 2x
    P = 3 | \mathbb{P} = 3
    E[X] = 3 | 3
    3 | E[X] = 3
    |AB| = 3 | 3
    3 | |\overrightarrow{AB}| = 3
    [ABC] = 3 | 3
    S_{\triangle ABC} = 3 | 3
    3 | \triangle ABC = 3
    \text{The area is } 12 | 12
    12 | \text{Area of triangle } ABC = 12
    12 | \text{The area of } \triangle ABC \text{ is } 12
    12 | \text{Minimum value: } 12
    12 | \text{min} = 12
    12 | \text{the minimum is 12}
    x<-1 \text{ or } x>1 | |x|>1
    (-\infty,-1)\cup(1,\infty) | x < -1, x > 1
    x<-1 \text{ or } x>1 | (-\infty,-1) \cup (1,\infty)
    x \in (1,2) \cup (3,4) | 1<x<2 \text{ or } 3<x<4
    \emptyset | \text{no solution}
    \emptyset | \{\}
    \varnothing | \text{None}
    x \in \mathbb{R} | \text{all real numbers}
    \text{all real numbers except } 0 | x \neq 0
    \text{all real } x \text{ except } x = 2 | \mathbb{R}\setminus\{2\}
    x\neq 1,2 | x \ne 1 \text{ and } x \ne 2
    (2, \infty) | x > 2
    \{x : x \ge 2\} | [2,\infty)
    \{x \in \mathbb{R} \mid x \ge 2\} | [2,\infty)
    x \ge 2, x \in \mathbb{R} | x\ge 2
    \{(1,2),(3,4)\} | (1,2), (3,4)
    (1,2),(3,4) | (1,2) \text{ and } (3,4)
    (x,y) = (1,2), (3,4) | (1,2), (3,4)
    x=1, y=2 | (x,y) = (1,2)
    x=1,y=2,z=3 | (1,2,3)
    x = 1 \text{ and } y = 2 | x=1, y=2
    x = 1, 2 | 1, 2
    x=1 \text{ or } x = 2 | 1, 2
    x = 1 \text{ or } 2 | x=1,x=2
    x_1 = 1, x_2 = 2 | 1, 2
    a=1, b=2 | (a,b)=(1,2)
    1 \le x \le 2 | [1,2]
    y=2x+1 | y = 1+2x
    y - 2x = 1 | y = 2x+1
    x^2+y^2=1 | y^2 + x^2 - 1 = 0
    \frac{x^2}{4}+y^2=1 | x^2+4y^2=4
    x+2y-3=0 | 2x+4y=6
"""

WRONG = r"""
    (2,1) | (1,2)
    (x,y)=(2,1) | x=1,y=2
    (x,y)=(2,1) | (y,x)=(2,1)
    7 | \ln x = 7
    7 | \sqrt{x} = 7
    7 | -x = 7
    7 | |x| = 7
    7 | xy = 7
    7 | x^2 = 7
    7 | 2x = 7
    7 | \frac{1}{x} = 7
    7 | x+y=7
    7 | \frac{x}{y} = 7
    7 | e^x = 7
    7 | \sin x = 7
    x<3 | -x<3
    x<3 | \ln x < 3
    x<3 | |x|<3
    x<3 | \frac1x<3
    (0,3) | 0<\sqrt{x}<3
    y=2x | \frac{dy}{dx}=2x
    \frac{dy}{dx}=2x | y=2x
    f'(x)=2x | f(x)=2x
    f(x)=2x | f'(x)=2x
    y'=2x | y=2x
    f(x)=2x | f^{-1}(x)=2x
    a_n = 2n | a_{n+1} = 2n
    a_n=2n | S_n=2n
    x_1=3 | x_2=3
    S_{\max}=3 | S_{\min}=3
    f(2)=5 | f(3)=5
    f''(x) = 2 | f'(x) = 2
    5-x | |x-5|
    x-500 | |x-500|
    n-m | |m-n|
    x | |x|
    x | \sqrt{x^2}
    n-5 | |n-5|
    1,1,2 | 1,2,2
    1,2 | 1,2,2
    1,1,2 | 1,2
    7 | 7 \text{ at least}
    7 | 7 \text{ at most}
    7 | 7\text{ or more}
    7 | \text{at least } 7
    7 | \text{at most 7}
    7 | \text{not } 7
    7 | \text{The answer is not } 7
    7 | 7 \text{ if } n \text{ is even}
    7 | 7 \text{ when } x > 0
    7 | 7 \text{ for } n=2
    7 | 7 \text{ per cent}
    7 | 7 \text{ permille}
    7 | 7‰
    7 | 7 \text{ lakh}
    7 | \$7\text{k}
    7 | 7\text{k}
    7 | \$7M
    7 | 7 \text{ dozen}
    7 | 7 \text{ or } 8
    7 | \text{7 or 8}
    7 | 7 \text{ out of } 10
    7 | 7 \text{ below zero}
    7 | 3万7
    7 | 7万
    7 | \text{twice } 7
    7 | \text{half of } 7
    (1,4) | \{x \mid x \ne 2\}
    (1,4) | \{x \in \mathbb{Z} : 1 < x < 4\}
    x \ne 2 | x \ne 3
    \mathbb{R} | x \ne 2
    (-\infty,-2]\cup\{1\} | a \le -2 \text{ or } a=2
    (-\infty,-2]\cup\{1\} | a \le -2
    x>2 \text{ and } x<5 | x>2 \text{ or } x<5
    x = 2k\pi, k \in \mathbb{Z} | x = k\pi, k \in \mathbb{Z}
    x = 2k\pi, k \in \mathbb{Z} | x = 2n\pi, n \in \mathbb{N}
    1 | \tanh(100)
    1 | \tanh(1000)
    1 | \cos(10^{-50})
    1 | 1+10^{-300}
    1 | 7^{10^{-300}}
    1 | \coth(50)
    \frac{\pi}{2} | \arctan(10^{60})
    x^2+1 | x^2+1+(x-1)(x-2)(x-3)
    n^2 | n^2+(n-5)(n-6)(n-7)(n-8)(n-9)(n-10)(n-11)(n-12)(n-13)(n-14)(n-15)(n-16)(n-17)(n-18)(n-19)(n-20)(n-21)(n-22)(n-23)(n-24)(n-25)(n-26)(n-27)(n-28)(n-29)(n-30)(n-31)(n-32)(n-33)(n-34)(n-35)(n-36)(n-37)(n-38)(n-39)(n-40)
    (1,100) | 1100
    (100,101) | \{100,101\}
    [2,5] | (2,5)
    f(x)=\begin{cases} x & x>0 \\ -x & x \le 0 \end{cases} | \begin{cases} x & x \le 0 \\ -x & x > 0 \end{cases}
    C_5^2 | 25
    15!! | (15!)!
    2\operatorname{cis}(60^\circ) | 2\operatorname{cis}(30^\circ)
    \binom{n}{2} | \binom{n}{3}
    3, 5 | 3
    3 | 3, 5
    0.333 | 1/3
    42 \text{ yen} | 42 \text{ yuan}
    \text{red and blue} | \text{red or blue}
    18 | 18^0^\circ
    x=3 | x=3 \text{ or } x=4
    x \le 3 | x < 3
    AB = 5 | AB = 7
    5 | A+B = 5
    5 | \sin A = 5
    5 | \lfloor x \rfloor = 5
    5 | n! = 5
    5 | x = -5
    10 | (1,0)
    10 | 1,0
    [1,2] | Interval.open(1, 2)
    (1,2) | Interval(1, 2)
    \{1,2\} | FiniteSet(1, 3)
    \pi/2 | pi/3
    5 \text{ m/s}^2 | 5 \text{ m/s}
    5 \text{ cm}^2 | 5 \text{ cm}^3
    45^\circ | 45^0
    45^\circ | 54^o
    0.\overline{36} | 0.36
    0.1\dot{6} | 0.\dot{1}\dot{6}
    \binom{n}{3} | \binom{3}{n}
    C_{n}^{k} | C_k^n
    (2n)!! | (2n)!
    12 | \text{The area is not } 12
    12 | \text{The area is less than } 12
    12 | \text{half the area is } 12
    12 | \text{The maximum is 13, not } 12
    12 | \text{the area is } 12 \text{ or } 13
    12 | \text{12 or 13}
    12 | \text{between 10 and 12}
    x<-1 \text{ or } x>1 | |x|<1
    \text{all real numbers except } 0 | \text{all real numbers}
    \text{all real numbers except } 0 | x \ne 1
    \emptyset | \{0\}
    \{(1,2),(3,4)\} | (2,1),(3,4)
    (1,2),(3,4) | (1,4),(3,2)
    x=1,y=2,z=3 | (1,3,2)
    x=1,y=2 | (2,1)
    a=1,b=2 | (b,a)=(1,2)
    x=1 \text{ or } x=2 | x=1
    |AB|=3 | |CD| = 4
    E[X]=3 | E[X^2]=4
    y=2x+1 | y=2x-1
    x+2y-3=0 | x+2y+3=0
    x \ge 2 | \{x \in \mathbb{Z} \mid x \ge 2\}
    7 | \frac{7}{\text{}}
    7 | 7^{}
    7 | 7_{}
    7 | \frac{7}
    7 | \sqrt{}
    7 | \text{7\%}
    7 | 7 \cdot
    3 | 3!!!
"""


def pairs(table: str) -> list[tuple[str, ...]]:
    return [tuple(side.strip() for side in line.split(" | ")) for line in table.strip().splitlines()]


@pytest.mark.parametrize(("gold", "prediction"), pairs(RIGHT))
def test_equivalent_notations_are_correct(gold: str, prediction: str) -> None:
    assert grade(gold, rf"Hence \boxed{{{prediction}}}.") == "correct"


@pytest.mark.parametrize(("gold", "prediction"), pairs(WRONG))
def test_different_values_are_not_correct(gold: str, prediction: str) -> None:
    assert grade(gold, rf"Hence \boxed{{{prediction}}}.") != "correct"
    assert grade(gold, f"The answer is ${prediction}$.") != "correct"


@pytest.mark.parametrize("degree", [1, 5, 20])
def test_no_polynomial_vanishes_at_the_random_points(degree: int) -> None:
    """Roots at integers and at half-integers are tried."""
    roots = [*range(-degree, degree + 1), *(f"{n}/2" for n in range(degree))]
    vanishing = "".join(f"(x-({root}))" for root in roots)
    assert grade("x^2+1", rf"\boxed{{x^2+1+{vanishing}}}") == "wrong"


def test_points_depend_on_the_pair_and_the_seed() -> None:
    def points(seed: int, prediction: str) -> str:
        """The value of an unknown when a worker of a run with that seed graded the pair."""
        with closing(Pool(Setup((f"{__file__}:value_of_x",), seed=seed), 1)) as pool:
            verdicts: Any = pool.submit(case(prediction, answer="x^2+1")).result()
        return str(verdicts[0][0].value)

    first, second = r"\boxed{1+x^2}", r"\boxed{x^2+ 1}"
    assert points(0, first) == points(0, first)
    assert len({points(0, first), points(1, first), points(0, second)}) == 3


def value_of_x(completion: str, answer: str) -> float:
    """A reward function for the test above."""
    assert grade(answer, completion) == "correct"
    return float(values._random_value("x", 0))
