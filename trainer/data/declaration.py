"""What is said of a data set once, for every sweep: a file beside its metadata.

``dp_sweeps.json`` in the folder of a version says whose privacy counts and what of the data set's
size is public, so that no specification has to be trusted to say it right. It holds no secret: a
protected size is not in it, only the public number to reckon with instead.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, cast, get_args

from accounting import PrivacyUnit
from trainer.errors import DatasetError

FILE_NAME = "dp_sweeps.json"
FORMAT = 1
Size = Literal["public", "protected"]
_MAX_WHOLE = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declaration:
    """What every sweep on a data set is held to.

    Attributes:
        privacy_unit: Whose data one neighbour more or less is.
        size: Whether the number of units is public. Where it is protected, neighbours differ by
            adding or removing one.
        user_feature: Feature that names the person, exactly where the unit is ``user``.
        declared_num_examples: Public number of units to reckon with, >= 1, where the size is
            protected; None leaves it to each specification.
    """

    privacy_unit: PrivacyUnit
    size: Size
    user_feature: str | None = None
    declared_num_examples: int | None = None

    def __post_init__(self) -> None:
        for field, choices in (("privacy_unit", get_args(PrivacyUnit)), ("size", get_args(Size))):
            value = getattr(self, field)
            if value not in choices:
                raise DatasetError(
                    f"{field}={value!r}: allowed is {' or '.join(choices)}", field=field
                )
        named = isinstance(self.user_feature, str) and self.user_feature != ""
        if named != (self.privacy_unit == "user") or not (named or self.user_feature is None):
            raise DatasetError(
                f"user_feature={self.user_feature!r}: allowed is the name of a feature where the "
                "unit is user, and none where it is example",
                field="user_feature",
            )
        number = self.declared_num_examples
        if number is not None and not (
            type(number) is int and 1 <= number <= _MAX_WHOLE and self.size == "protected"
        ):
            raise DatasetError(
                f"declared_num_examples={number!r}: allowed is a whole number from 1 to "
                f"{_MAX_WHOLE} where the size is protected, and none where it is public",
                field="declared_num_examples",
            )

    @property
    def hides_num_examples(self) -> bool:
        """Whether numbers of examples must not be shown.

        Where people are the unit, only their number can be public: how many examples somebody
        has is theirs.
        """
        return self.size == "protected" or self.privacy_unit == "user"


def read_declaration(version_dir: Path) -> Declaration | None:
    """What was declared of a data set; None where nothing was.

    Args:
        version_dir: Folder of a version of the data set.

    Raises:
        DatasetError: The file is there and cannot be read, or says what is not allowed.
    """
    path = version_dir / FILE_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DatasetError(f"declaration {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise DatasetError(f"declaration {path}: allowed is an object of format {FORMAT}")
    try:
        return Declaration(**cast("dict[str, Any]", found))
    except (TypeError, DatasetError) as error:
        raise DatasetError(f"declaration {path}: {error}") from error


def write_declaration(version_dir: Path, declaration: Declaration, *, replace: bool) -> None:
    """Writes a declaration, whole or not at all.

    Args:
        version_dir: Folder of a version of the data set.
        declaration: What to say of it.
        replace: Whether to replace another one that is there.

    Raises:
        DatasetError: There is another one, or the folder cannot be written.
    """
    path = version_dir / FILE_NAME
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(declaration)}, indent=1) + "\n"
    try:
        descriptor, scratch = tempfile.mkstemp(prefix=f".{FILE_NAME}-", dir=version_dir)
        with contextlib.ExitStack() as after:
            after.callback(Path(scratch).unlink, missing_ok=True)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(scratch, 0o644)  # Whoever reads the data set reads it.
            if replace:
                os.replace(scratch, path)
                return
            # Unlike a rename, a link never takes the place of what another process has written.
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)
                return
    except OSError as error:
        raise DatasetError(f"declaration {path} cannot be written: {error.strerror}") from error
    if read_declaration(version_dir) != declaration:
        raise DatasetError(
            f"declaration {path} says something else already; allowed is to say the same, or to "
            "replace it (--replace)"
        )
