"""What can happen in the news: the type of an event kind, and the sentences that all kinds share.

Templates are `str.format` strings over the slots below; `[a|b]` is a choice made while a text is put together, `[|a]`
leaves something out at times. «в» and «з» are written plainly: `euphony` turns them into у, із, зі where they must be.

    P   the person with role («тренерка Олена Коваль»), nominative; Q the surname alone, nominative
    v   the ending of the past tense, в or ла («сказа{v}»); a the adjective's, ий or а
    c   the town (c.nom, c.gen, c.loc, c.ins), d a date, m a sum
    n   the number that matters, o and k others that do not; "{n:школи/шкіл}" gives the noun its form
    x, y  tuples of the kind's own vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

from temper.data.mini.words import MONTHS


@dataclass(frozen=True)
class Kind:
    """One kind of event.

    `tellings` are ways to tell it: sentences, each with a part of the facts; those after the first may
    change places. `asides` are sentences that do not matter.
    """

    topic: str
    roles: tuple[str, ...]
    x: tuple[tuple[str, ...], ...]
    tellings: tuple[tuple[str, ...], ...]
    asides: tuple[str, ...]
    summary: str
    title: str
    y: tuple[tuple[str, ...], ...] = (("",),)
    n: tuple[int, int] = (5, 60)
    genitive: bool = False  # only numbers that rule the genitive plural: for people, whose accusative differs
    scale: str = "мільйон"  # of the sum
    months: tuple[str, ...] = MONTHS
    sad: bool = False  # then nobody is glad in the quotations


QUOTES = (
    "Ми довго цього чекали",
    "[Це важливий крок|Це чудова новина] для всієї громади",
    "Роботи попереду ще багато",
    "Без команди нічого б не вийшло",
    "[Дякуємо|Я дякую] всім, хто [допомагав|був поруч]",
    "[Далі|Тепер] буде [ще краще|легше]",
    "Ми все [порахували|перевірили] двічі",
    "[Такого|Подібного] в нас ще не було",
    "Результат [говорить сам за себе|нас порадував]",
    "[Запитань|Питань] іще багато, але [відповіді знайдемо|ми впораємося]",
)
SAD_QUOTES = (
    "Ситуація [під контролем|поступово поліпшується]",
    "Просимо [людей|всіх] зберігати спокій",
    "[Причини|Обставини] ще з’ясовують",
    "Ми робимо все можливе",
    "[Такого|Подібного] давно не бачили",
    "Зараз важлива кожна [година|хвилина]",
    "Наші люди працюють [без перерви|цілодобово]",
    "Будьте, [прошу|будь ласка], обережні",
)
SAYING = (
    "«{quote}», — [сказа{v}|зауважи{v}|дода{v}|підсумува{v}] {Q}.",
    "{Q} [переконан{a}|не приховує|каже|наголошує]: «{quote}».",
    "[Журналістам|Нашому виданню|На зустрічі з пресою] {Q} сказа{v}: «{quote}».",
)
SAD_COMMENTS = (
    "[Мешканці|Жителі] [активно |жваво |]обговорюють [новину|подію] в соцмережах.",
    "[Місцеві|Обласні] [журналісти|видання] [стежать|уважно стежать] за розвитком подій.",
    "[Подробиці|Деталі] обіцяють [оприлюднити|повідомити] [згодом|найближчими днями|наступного тижня].",
    "[Фото|Знімки|Відео] [з’явилися|вже є] в [мережі|місцевих групах].",
    "[У міській раді|В обласній адміністрації] [поки|наразі] [цього не коментують|утрималися від заяв].",
    "На сайті міста [цю |]новину прочитали вже {k} тисяч разів.",
)
COMMENTS = (
    *SAD_COMMENTS,
    "[Думки|Погляди] [містян|людей] [розділилися|поки що різні].",
    "[Торік|Позаторік|Кілька років тому] про [схоже|таке] [лише мріяли|ніхто й не думав].",
    "[Експерти|Фахівці] [раніше |давно |]говорили, що [так і буде|до цього йшлося].",
    "[Сусідні громади|Сусіди] [уважно |]вивчають цей досвід.",
)
OPENERS = (  # before the first sentence, at times
    "[Сьогодні|Вранці|Ввечері|На вихідних|Цього тижня|Учора] стало відомо: ",
    "[Місцеві|Обласні] [видання|журналісти|оглядачі] [пишуть|повідомляють|розповідають]: ",
    "[Новина|Подія] [дня|тижня|місяця] з [області|регіону|району]: ",
    "[Пресслужба|Сайт] [міськради|громади|області] [повідомляє|інформує]: ",
)
