"""Vocabularies of the Ukrainian news: people, towns, months, sums. All written for this project; people are made up."""

from __future__ import annotations

from dataclasses import dataclass

from temper.data.mini.draw import Draw, Num, plural


def names(line: str, between: str | None = None) -> list[str]:
    """A vocabulary written in one line."""
    return line.split(between)


@dataclass(frozen=True)
class City:
    """A town: nominative, genitive, locative, instrumental."""

    nom: str
    gen: str
    loc: str
    ins: str


CITIES = [
    City(*line.split(","))
    for line in (
        "Київ,Києва,Києві,Києвом",
        "Харків,Харкова,Харкові,Харковом",
        "Одеса,Одеси,Одесі,Одесою",
        "Дніпро,Дніпра,Дніпрі,Дніпром",
        "Львів,Львова,Львові,Львовом",
        "Запоріжжя,Запоріжжя,Запоріжжі,Запоріжжям",
        "Вінниця,Вінниці,Вінниці,Вінницею",
        "Полтава,Полтави,Полтаві,Полтавою",
        "Чернігів,Чернігова,Чернігові,Черніговом",
        "Черкаси,Черкас,Черкасах,Черкасами",
        "Житомир,Житомира,Житомирі,Житомиром",
        "Суми,Сум,Сумах,Сумами",
        "Хмельницький,Хмельницького,Хмельницькому,Хмельницьким",
        "Чернівці,Чернівців,Чернівцях,Чернівцями",
        "Рівне,Рівного,Рівному,Рівним",
        "Тернопіль,Тернополя,Тернополі,Тернополем",
        "Луцьк,Луцька,Луцьку,Луцьком",
        "Ужгород,Ужгорода,Ужгороді,Ужгородом",
        "Миколаїв,Миколаєва,Миколаєві,Миколаєвом",
        "Біла Церква,Білої Церкви,Білій Церкві,Білою Церквою",
        "Кременчук,Кременчука,Кременчуці,Кременчуком",
        "Умань,Умані,Умані,Уманню",
        "Ніжин,Ніжина,Ніжині,Ніжином",
        "Дрогобич,Дрогобича,Дрогобичі,Дрогобичем",
        "Калуш,Калуша,Калуші,Калушем",
        "Стрий,Стрия,Стрию,Стриєм",
        "Мукачево,Мукачева,Мукачеві,Мукачевом",
        "Бердичів,Бердичева,Бердичеві,Бердичевом",
        "Ізмаїл,Ізмаїла,Ізмаїлі,Ізмаїлом",
        "Лубни,Лубен,Лубнах,Лубнами",
        "Конотоп,Конотопа,Конотопі,Конотопом",
        "Ковель,Ковеля,Ковелі,Ковелем",
    )
]

_MEN = names(
    "Олег Андрій Іван Петро Степан Тарас Максим Богдан Віктор Роман Назар Остап Павло Дмитро Сергій Юрій Ігор "
    "Василь Микола Олексій Артем Денис Ярослав Михайло"
)
_WOMEN = names(
    "Олена Ірина Марія Оксана Наталя Тетяна Ганна Юлія Світлана Катерина Софія Дарина Леся Галина Людмила Вікторія "
    "Надія Соломія Христина Зоряна Лариса Ольга Віра Яна"
)
# Masculine nominative; the feminine follows from the ending.
_SURNAMES = names(
    "Коваленко Шевченко Бондаренко Ткаченко Кравченко Олійник Шевчук Поліщук Лисенко Марченко Савченко Руденко "
    "Петренко Мельник Клименко Павленко Гнатюк Романюк Приходько Кузьменко Левченко Панченко Гончарук Назаренко "
    "Мартинюк Сидоренко Василенко Тимошенко Костюк Яценко Федоренко Харченко Ковальчук Мельничук Тарасенко Дяченко "
    "Білецький Вишневський Залізняк Гончар Бондар Кравчук Іваненко Литвиненко Семенюк Зінченко Садовський Яворський "
    "Калиновський Левицький Гайдук Стельмах Вдовиченко Демченко Остапчук Пономаренко Криницький Верховинський "
    "Данилюк Захарчук"
)


@dataclass(frozen=True)
class Person:
    """A person with a role (both in the nominative)."""

    first: str
    last: str
    role: str
    female: bool

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"


# Full names are dealt out to the splits, so that no text of one split can occur in another, whatever the seed.
# (None, the undivided set, is a fourth split of its own.)
SPLITS: dict[str | None, tuple[int, ...]] = {
    None: (0, 1, 2),
    "train": (3, 4, 5, 6, 7),
    "validation": (8,),
    "test": (9,),
}


def person(draw: Draw, roles: str, split: str | None) -> Person:
    """Somebody of the split; `roles` is «тренер/тренерка»."""
    female = draw.chance(0.5)
    firsts = _WOMEN if female else _MEN
    last = draw.position(0, len(_SURNAMES) - 1)
    first = draw.position(0, len(firsts) - 1)
    while (last + 3 * first) % 10 not in SPLITS[split]:
        first = (first + 1) % len(firsts)
    surname = _SURNAMES[last]
    if female and surname.endswith("ий"):
        surname = surname[:-2] + "а"
    return Person(firsts[first], surname, roles.split("/")[female], female)


MONTHS = tuple(names("січня лютого березня квітня травня червня липня серпня вересня жовтня листопада грудня"))
WINTER, SUMMER = ("грудня", "січня", "лютого"), ("червня", "липня", "серпня")
PLANTING = ("березня", "квітня", "жовтня", "листопада")
DAYS = ("понеділок", "вівторок", "середу", "четвер", "п’ятницю", "суботу", "неділю")


def date(draw: Draw, months: tuple[str, ...] = MONTHS) -> str:
    """«12 березня»."""
    return f"{draw.position(1, 28)} {draw.pick(months)}"


def money(draw: Draw, scale: str) -> str:
    """A sum in hryvnias; `scale` is «тисяч» (20–950 thousand) or «мільйон» (2–95 million)."""
    if scale == "тисяч":
        return f"{10 * draw.position(2, 95)} тисяч гривень"
    n = draw.position(2, 95)
    if n < 10 and draw.chance(0.5):
        return f"{n},5 мільйона гривень"
    n += n % 10 == 1
    return f"{Num(n)} {plural(n, 'мільйони', 'мільйонів')} гривень"
