"""The commands about data sets: list, show, prepare, declare."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accounting import PrivacyUnit
from sweeps.cli.options import JsonOption
from sweeps.cli.output import err, out, print_json
from sweeps.cli.synthetic_options import SyntheticOptions
from sweeps.errors import CommandError, SweepError
from sweeps.home import Home
from trainer.data.declaration import Size
from trainer.data.synthetic.request import Encoding

if TYPE_CHECKING:
    from trainer.config import DataConfig
    from trainer.data.catalog import PreparedDataset
    from trainer.data.dataset_location import Location

app = typer.Typer(
    help="Data sets that are prepared for training.\n\nExample: dp-sweeps data list",
    no_args_is_help=True,
)

DatasetArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="TFDS name, such as digits or cifar10:3.0.2.")
]
# Not a Path, which would make a directory's name out of a URL.
DataDirOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="TFDS data directory, the only one looked at; else the usual places."
    ),
]


@app.command("list")
def list_datasets(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """List the prepared data sets: below DP_SWEEPS_HOME and in TFDS's own directory.

    Example: dp-sweeps data list --data-dir /mnt/tfds
    """
    from sweeps.report.data_view import DatasetList, datasets_json
    from trainer.data.catalog import catalog
    from trainer.data.dataset_location import search_dirs

    with _refusals(), err.status("reading metadata"):
        places = search_dirs(_config("digits", data_dir), Home.from_environment().data_dir)
        found = catalog(places)
    if as_json:
        print_json(datasets_json(found))
    else:
        out.print(DatasetList(found))


@app.command()
def show(
    name: DatasetArgument, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Show the public facts about a data set, and what is declared of it.

    Example: dp-sweeps data show digits
    """
    from trainer.data.catalog import inspect

    with _refusals():
        found = inspect(_find(name, data_dir))
    _print(found, as_json)


@app.command()
def prepare(
    name: Annotated[
        str,
        typer.Argument(
            metavar="digits|synthetic|NAME",
            help="The built-in data set, a random one, or one that TFDS knows.",
        ),
    ],
    examples: Annotated[
        int | None, typer.Option(help="Of synthetic: training examples; a fifth more for test.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="HxWxC", help="Of synthetic: an image, as 32x32x3.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Of synthetic: classes.")] = None,
    users: Annotated[
        int | None,
        typer.Option(help="Of synthetic: people to whom the examples belong (feature user)."),
    ] = None,
    called: Annotated[
        str | None,
        typer.Option("--name", help="Of synthetic: it becomes synthetic_NAME; else blobs."),
    ] = None,
    encoding: Annotated[
        Encoding | None,
        typer.Option(help="Of synthetic: raw pixels, quickest to read, or png files; else raw."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of synthetic: the same gives the same bytes; else 0.")
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="TFDS data directory to write to; else below the home."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a data set to a data directory, whole or not at all, unless it is there.

    Example: dp-sweeps data prepare digits

    Example: dp-sweeps data prepare synthetic --examples 50000 --shape 32x32x3 --classes 10
    """
    from sweeps.cli.synthetic_options import prepare_synthetic_dataset
    from trainer.data.catalog import inspect
    from trainer.data.dataset_location import find, find_or_prepare
    from trainer.data.preparing import prepare_with_tfds

    options = SyntheticOptions(
        examples=examples,
        shape=shape,
        classes=classes,
        users=users,
        name=called,
        encoding=encoding,
        seed=seed,
    )
    home = Home.from_environment()
    with _refusals():
        if name != "synthetic":
            options.refuse_any()
        config = _config(name, data_dir)
        place = _writable(config, home)
        if name == "synthetic":
            written = prepare_synthetic_dataset(options, place)
            location = find(_config(written, str(place)), search_dirs=[place])
        elif name.partition(":")[0] == "digits":
            location = find_or_prepare(_config(name, str(place)), home.data_dir)
        else:
            with err.status(f"running TFDS's builder of {name}, which may download"):
                location = prepare_with_tfds(config, place)
        found = inspect(location)
    _print(found, as_json)


@app.command()
def declare(
    name: DatasetArgument,
    unit: Annotated[PrivacyUnit, typer.Option(help="Whose data one neighbour more or less is.")],
    size: Annotated[Size, typer.Option(help="Whether the number of units is public.")],
    user_feature: Annotated[
        str | None,
        typer.Option(metavar="FEATURE", help="Feature that names the person, for unit user."),
    ] = None,
    declared_num_examples: Annotated[
        int | None,
        typer.Option(metavar="N", help="Public number of units where the size is protected."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace another declaration that is there.")
    ] = False,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say once, for every sweep, whose privacy counts and what of the size is public.

    Example: dp-sweeps data declare scans --unit example --size protected
    --declared-num-examples 50000
    """
    from trainer.data import catalog
    from trainer.data.declaration import Declaration

    with _refusals():
        location = _find(name, data_dir)
        declaration = Declaration(
            privacy_unit=unit,
            size=size,
            user_feature=user_feature,
            declared_num_examples=declared_num_examples,
        )
        catalog.declare(location, declaration, replace=replace)
        found = catalog.inspect(location)
    _print(found, as_json)


def _print(dataset: "PreparedDataset", as_json: bool) -> None:
    from sweeps.report.data_view import DatasetView, dataset_json

    if as_json:
        print_json(dataset_json(dataset))
    else:
        out.print(DatasetView(dataset))


def _config(name: str, data_dir: str | None) -> "DataConfig":
    from trainer.config import DataConfig

    return DataConfig(name=name, data_dir=data_dir)


def _find(name: str, data_dir: str | None) -> "Location":
    from trainer.data.dataset_location import find, search_dirs

    config = _config(name, data_dir)
    return find(config, search_dirs=search_dirs(config, Home.from_environment().data_dir))


def _writable(config: "DataConfig", home: Home) -> Path:
    """The directory to write to; the home is made where it is below it."""
    from trainer.data.dataset_location import search_dirs

    if config.data_dir is None:
        home.create()
    return search_dirs(config, home.data_dir)[0]


@contextmanager
def _refusals() -> Generator[None]:
    """Turns what the trainer refuses into errors of the command line."""
    from trainer.data.preparing import PreparationError
    from trainer.errors import ConfigError, DatasetError

    try:
        yield
    except PreparationError as error:
        raise SweepError(str(error)) from error
    except (ConfigError, DatasetError) as error:
        raise CommandError(str(error)) from error
