from collections.abc import Callable

from jsonargparse import Namespace

from rlhf_lightning.config_types import known_classes, misplaced_nulls, plain, readable_type


class Base:
    def __init__(
        self, size: int = 1, limit: int | None = 3, name: str | None = None, rest: "Base | None" = None
    ) -> None:
        self.size, self.limit, self.name, self.rest = size, limit, name, rest


class Derived(Base):
    pass


def test_classes_of_a_callable_are_those_it_returns() -> None:
    assert known_classes(Callable[[int], Base]) == ["Base", "Derived"]
    assert known_classes(int | None) == []


def test_types_are_said_in_words() -> None:
    assert readable_type(list[int]) == "a list [an integer, ...]"
    assert readable_type(str | bool) == "text or true or false"
    assert readable_type(None) == ""


def test_packages_are_left_out() -> None:
    assert plain("list[collections.abc.Sized] | <class 'int'>") == "list[Sized] | int"


def test_null_is_misplaced_where_neither_type_nor_default_takes_it() -> None:
    class_path = f"{Base.__module__}.Base"
    inner = Namespace(class_path=class_path, init_args=Namespace(size=None, limit=None, name=None))
    outer = Namespace(class_path=class_path, init_args=Namespace(size=2, rest=inner))
    assert list(misplaced_nulls(Namespace(model=outer, data=None), [])) == [(["model", "rest", "size"], int)]
    assert list(misplaced_nulls([inner], ["parts"])) == [(["parts", "size"], int)]
