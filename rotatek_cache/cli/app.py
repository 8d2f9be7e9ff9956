"""The console command `rotatek`: arguments, progress and tables around `demo`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from rotatek_cache import FitOptions, __version__
from rotatek_cache.calibration.images import NO_IMAGES, NO_TEXTS, calibrate_images, open_images, open_texts
from rotatek_cache.calibration.moments import KEY_METHODS, VALUE_METHODS
from rotatek_cache.cli.demo import (
    ANY_CALIBRATION,
    ANY_QUESTION,
    CODED,
    LONG_PROMPT,
    READER_CALIBRATION,
    READER_PAGE,
    READER_QUESTIONS,
    SPARSITIES,
    TIMED_ROUNDS,
    TIMED_TOKENS,
    Answer,
    Cost,
    DemoResult,
    Page,
    Question,
    Setting,
    comparison,
    open_page,
    run,
    steps,
)
from rotatek_cache.cli.demo_figure import draw
from rotatek_cache.cli.estimate import default_caches, dtype_named, estimates, load_config, notes, options_of, table
from rotatek_cache.hf.chat import Chat, InputError, open_image, user_turn
from rotatek_cache.hf.identity import Identity, check_identity

app = typer.Typer(
    help="RotateK: a KV cache for vision-language models that keeps visual Keys as a few coefficients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rotatek-cache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before a command; the docstring that users see is the app's."""


@app.command()
def demo(
    *,
    image: Annotated[
        Path | None, typer.Option(help="Image to ask about; by default a page that comes with the package.")
    ] = None,
    question: Annotated[list[str] | None, typer.Option(help="Question about it; may be given several times.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Vision-language model, by name or path; by default the reader that comes with the package."),
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="Share of Key channels removed, in [0, 1); may be given several times."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    timed_tokens: Annotated[
        int, typer.Option(min=3, help="Tokens that the runs generate in which time and bytes are measured.")
    ] = TIMED_TOKENS,
    long_prompt: Annotated[
        int,
        typer.Option(
            min=0,
            help="Visual tokens of a prompt that repeats the image, to measure bytes and time once more; 0 for none.",
        ),
    ] = LONG_PROMPT,
    device: Annotated[str, typer.Option(help="Device of torch; auto takes CUDA where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Dtype of torch for the weights; auto takes the checkpoint's.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo_output"),
) -> None:
    """Ask a model about an image, with the dense cache and with RotateKCache: several sparsities, and codes.

    Prints answers, bytes of the cache and time per token, and draws them into a PNG. Bytes and time are measured again
    with a long prompt, which holds the image many times. Where the true answers are known
    (from a pages.json beside the image) answers are right or wrong; otherwise they are compared with the dense cache's.
    """
    try:
        settings = [*_settings(sparsity), CODED]
        page = open_page(READER_PAGE if image is None else image)
        questions = _questions(page, question, shipped_reader=model is None)
        console = Console()
        with err.status("loading the model"):
            chat = _load(model, device, dtype)
        with _progress() as progress:
            total = steps(len(questions), len(settings), long_prompt=bool(long_prompt))
            task = progress.add_task("", total=total)

            def advance(what: str) -> None:
                progress.update(task, description=escape(what[:40]))
                progress.advance(task)

            result = run(
                chat,
                page,
                questions,
                settings=settings,
                max_new_tokens=max_new_tokens,
                timed_tokens=timed_tokens,
                long_prompt=long_prompt,
                advance=advance,
            )
        _show(result, console)
        try:
            out.mkdir(parents=True, exist_ok=True)
            picture = out / f"{page.path.stem}.png"
            draw(result, picture)
        except OSError as error:
            raise InputError(f"the picture cannot be written to '{out}': {error}") from error
        console.print(f"\npicture: {picture}", soft_wrap=True, highlight=False)
    except InputError as error:
        _fail(str(error))


@app.command()
def calibrate(
    *,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder of images, read with its subfolders in the order of their names, or a dataset: its name "
            "(owner/name or owner/name/configuration), or a folder that `save_to_disk` wrote."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file, or folder of .txt files, like the text to come: the file then serves text='coded' too, "
            "which codes all tokens. Without --images it serves that alone."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Basis file to write (.safetensors).")],
    model: Annotated[
        str | None, typer.Option(help="Vision-language model, by name or path; by default the package's reader.")
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(help="Questions to ask in turn, of every kind that will come; may be given several times."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help=f"Basis of Keys: {', '.join(KEY_METHODS)}. fisher weighs errors by what they do to answers of the "
            "model, which is differentiated for it."
        ),
    ] = KEY_METHODS[0],
    value_method: Annotated[
        str,
        typer.Option(help=f"Basis of Values: {', '.join(VALUE_METHODS)} (the last weighs by the output projection)."),
    ] = VALUE_METHODS[0],
    most: Annotated[int | None, typer.Option(min=1, help="Use the first so many images only.")] = None,
    text_tokens: Annotated[
        int, typer.Option(min=128, help="Tokens of a passage of --text: about as many as prompts will have.")
    ] = 1024,
    most_text: Annotated[int | None, typer.Option(min=1, help="Use the first so many passages only.")] = 64,
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    save_every: Annotated[int, typer.Option(min=1, help="Images between two saves of the state.")] = 64,
    device: Annotated[str, typer.Option(help="Device of torch; auto takes CUDA where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Dtype of torch for the weights; auto takes the checkpoint's.")] = "auto",
) -> None:
    """Fit bases for Keys and Values to many images, or to images and text, once per model, for RotateKCache(basis=...).

    A run that is stopped goes on where it was last saved when it is started again with the same --out.
    """
    try:
        _check_calibration(out, method, value_method, question or [], given=images is not None or text is not None)
        found = NO_IMAGES if images is None else open_images(images, split, most)
        with err.status("loading the model"):
            chat = _load(model, device, dtype)
        texts = NO_TEXTS if text is None else open_texts(text, chat.processor.tokenizer, text_tokens, most_text)
        with _progress() as progress:
            task = progress.add_task("calibrating", total=len(found) + len(texts))
            calibrated = calibrate_images(
                chat,
                found,
                question or list(READER_CALIBRATION if model is None else ANY_CALIBRATION),
                out,
                method=method,
                value_method=value_method,
                save_every=save_every,
                texts=texts,
                advance=lambda done: progress.update(task, completed=done),
            )
        Console().print(
            Text(
                f"{out}: {out.stat().st_size:,} bytes from {calibrated.images} images ({calibrated.skipped} skipped)"
                + (f" and {calibrated.texts} passages of text" if calibrated.texts else "")
            ),
            soft_wrap=True,
        )
    except InputError as error:
        _fail(str(error))


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Vision-language model, by name or path.")],
    *,
    image: Annotated[
        Path | None, typer.Option(help="Image to ask about; by default a page that comes with the package.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Questions about it, the rows of a batch; may be given several times.")
    ] = None,
    visual_token_id: Annotated[
        list[int] | None,
        typer.Option(help="Id that stands for visual tokens, if the family is not known; may be given several times."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 8,
    device: Annotated[str, typer.Option(help="Device of torch; auto takes CUDA where there is one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Dtype of torch for the weights; in float32 the smallest fault shows.")
    ] = "float32",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Check that a model works with a RotateKCache: with nothing removed it must give what the dense cache gives.

    Asks one question, then all of them as one batch, padded on the left. Ends with 0 if all logits are the same but for
    rounding, with 1 if not, and with 2 if the model cannot be checked, saying why.
    """
    try:
        questions = question or list(CHECK_QUESTIONS)
        shown = open_image(READER_PAGE if image is None else image)
        with err.status("loading the model"):
            chat = _load(model, device, dtype, visual_token_ids=visual_token_id, trust_remote_code=trust_remote_code)
        batches = [chat.prompt([shown], questions[0])]
        if chat.has_template and len(questions) > 1:
            batches.append(chat.inputs([[user_turn(text, [shown])] for text in questions]))
        with err.status("generating with both caches"):
            found = [_identity(chat, inputs, tokens) for inputs in batches]
        for identity in found:
            typer.echo(str(identity))
        if not all(identity.holds for identity in found):
            raise typer.Exit(1)
    except InputError as error:
        _fail(str(error))


@app.command()
def estimate(
    *,
    model: Annotated[str, typer.Argument(help="Vision-language model, by name or path, or its config.json.")],
    visual_tokens: Annotated[int, typer.Option(min=0, help="Visual tokens of a prompt.")],
    text_tokens: Annotated[int, typer.Option(min=0, help="All other tokens of a prompt.")] = 64,
    answer_tokens: Annotated[int, typer.Option(min=0, help="Tokens of an answer that are cached.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    images: Annotated[int, typer.Option(min=1, help="Images that the visual tokens of a prompt are.")] = 1,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help='Options of RotateKCache, as in "sparsity=0.75 basis=pca tokens=fastv:0.5"; may be given several '
            "times. By default some sparsities, and codes."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of Keys and Values; by default the checkpoint's.")] = None,
) -> None:
    """Print the bytes of the cache of a prompt before anything runs, dense and by options; needs the config only."""
    try:
        config, wanted = load_config(model), dtype_named(dtype)
        found = estimates(
            config,
            [options_of(spec) for spec in cache] if cache else default_caches(),
            visual_tokens=visual_tokens,
            text_tokens=text_tokens,
            answer_tokens=answer_tokens,
            batch=batch,
            images=images,
            dtype=wanted,
        )
        console = Console()
        console.print(table(found))
        for note in notes(config, wanted, found):
            console.print(note, soft_wrap=True)
    except InputError as error:
        _fail(str(error))


CHECK_QUESTIONS = ("What is in this image?", "Describe it, and say where in the image each thing is.")


def _identity(chat: Chat, inputs: Any, tokens: int) -> Identity:
    try:
        return check_identity(chat.model, inputs, tokens=tokens)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"'{chat.name}' cannot be checked: {error}") from error


def _check_calibration(out: Path, method: str, value_method: str, questions: list[str], *, given: bool) -> None:
    if not given:
        raise InputError("--images or --text must be given: what is calibrated on")
    if not all(text.strip() for text in questions):
        raise InputError("--question must not be empty: a cache seals an image once text follows it")
    if out.suffix != ".safetensors":
        raise InputError(f"--out must end in .safetensors, got '{out}'")
    if method not in KEY_METHODS:
        raise InputError(f"--method must be one of {', '.join(KEY_METHODS)}, got '{method}'")
    if value_method not in VALUE_METHODS:
        raise InputError(f"--value-method must be one of {', '.join(VALUE_METHODS)}, got '{value_method}'")


def _fail(message: str) -> NoReturn:
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    raise typer.Exit(2)


def _load(model: str | None, device: str, dtype: str, **options: Any) -> Chat:
    disable_progress_bar()
    return Chat.load(model, device=device, dtype=dtype, template_needed=False, **options)


def _settings(given: list[float] | None) -> list[Setting]:
    sparsities = list(dict.fromkeys(given or SPARSITIES))
    for value in sparsities:
        try:
            FitOptions(sparsity=value)
        except ValueError as error:
            raise InputError(str(error)) from error
    return [Setting.of_sparsity(value) for value in sparsities]


def _questions(page: Page, given: list[str] | None, *, shipped_reader: bool) -> list[Question]:
    if given:
        return [page.question(text) for text in dict.fromkeys(given)]
    return page.samples() or [Question(text) for text in (READER_QUESTIONS if shipped_reader else (ANY_QUESTION,))]


def _progress() -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=err, transient=True)


def _show(result: DemoResult, console: Console) -> None:
    page = result.page
    facts = [
        f"image      {_short(page.path)}, {page.image.width} x {page.image.height}",
        f"model      {result.model}, {result.dtype} on {result.device}",
        f"prompt     {result.visual_tokens} visual tokens; head width {result.head_width}",
    ]
    for line in facts:
        console.print(Text(line), soft_wrap=True)
    console.print()
    console.print(_answers_table(result))
    console.print()
    console.print(_cache_table(result))
    if result.long_prompt is not None:
        many = result.long_prompt
        console.print()
        console.print(
            Text(
                f"A longer prompt: the image {many.copies} times, {many.visual_tokens} visual tokens. "
                f"Bytes and time only: {_no_answers(result)}"
            ),
            soft_wrap=True,
        )
        console.print(_cost_table(many.costs))
    console.print(
        Text(
            f"Bytes: storage of all tensors that the cache holds at {result.dense.tokens} tokens"
            + (f", {result.long_prompt.dense.tokens} in the longer prompt" if result.long_prompt else "")
            + ", space reserved for coming text included. "
            f"Time: median decode step of the whole model over {TIMED_ROUNDS} rounds. A sparsity compresses visual "
            "Keys only, so at most half of the cache is saved; coded, visual Values are compressed too "
            f"({', '.join(f'{name}={value!r}' for name, value in (CODED.options or {}).items())})"
            + (". In 16 bits the dense cache would be half as large." if result.dtype == "float32" else "."),
            style="dim",
        )
    )
    for even in result.break_even():
        text = "never saves bytes" if even.tokens is None else f"saves bytes from {even.tokens} visual tokens on"
        console.print(Text(f"sparsity {even.sparsity:g} {text} (shorter segments stay dense)", style="dim"))
    shown = result.compressed[-1]
    console.print()
    console.print(Text(str(shown.report)), soft_wrap=True)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _answers_table(result: DemoResult) -> Table:
    """Lay out the questions with the distinct answers to each and the settings that gave them."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("question", "answer", "", "given by (sparsity)"):
        table.add_column(column)
    rows: list[tuple[Question, str, list[tuple[str, Answer]]]] = [
        (answer.question, "", [(m.setting.label, m.answers[index]) for m in result.measurements])
        for index, answer in enumerate(result.dense.answers)
    ]
    if result.dense.follow_up is not None:
        turns = [(m.setting.label, m.follow_up) for m in result.measurements if m.follow_up is not None]
        rows.append((result.dense.follow_up.question, "second turn: ", turns))
    for question, prefix, answers in rows:
        groups: dict[str, list[tuple[str, Answer]]] = {}
        for label, answer in answers:
            groups.setdefault(answer.text, []).append((label, answer))
        first = Text(prefix, style="dim") + Text(question.text, style="bold")
        for text, members in groups.items():
            labels = "all" if len(groups) == 1 else ", ".join(label for label, _ in members)
            table.add_row(first, Text(text or "(nothing)"), _verdict(members), labels)
            first = Text()
        if question.truth is not None and question.truth not in groups:
            table.add_row(first, Text(question.truth, style="dim"), Text("true answer", style="dim"), "")
    return table


def _verdict(members: list[tuple[str, Answer]]) -> Text:
    """Judge an answer that these settings gave."""
    answer = members[0][1]
    if answer.right is not None:
        return Text("right", style="green") if answer.right else Text("wrong", style="red")
    if [label for label, _ in members] == ["dense"]:
        return Text("")
    return Text("as dense", style="green") if answer.same else Text("differs", style="red")


def _no_answers(result: DemoResult) -> str:
    if result.is_shipped_reader:
        return "the reader was trained on one page a prompt, so its answers would say nothing."
    return "answers to the same image many times over would say little."


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("cache", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _costs(cost: Cost, dense: Cost) -> list[str]:
    name = "dense (DynamicCache)" if cost.setting.is_dense else f"RotateKCache, {cost.setting.label}"
    compared = "-" if cost.setting.is_dense else comparison(dense, cost)
    return [name, f"{cost.nbytes:,}", compared, f"{cost.ms_per_token:.2f}"]


def _cost_table(costs: Sequence[Cost]) -> Table:
    """Lay out bytes and time; `costs` begin with the dense cache's."""
    table = _table("bytes", "against dense", "ms/token", "speed")
    for cost in costs:
        speed = "-" if cost.setting.is_dense else f"{costs[0].ms_per_token / cost.ms_per_token:.2f}x"
        table.add_row(*_costs(cost, costs[0]), speed)
    return table


def _cache_table(result: DemoResult) -> Table:
    """Lay out bytes, time and how many answers are right or as the dense cache's."""
    table = _table("bytes", "against dense", "ms/token", "right", "as dense")
    for m in result.measurements:
        answers = [*m.answers, *([m.follow_up] if m.follow_up is not None else [])]
        known = [a for a in answers if a.right is not None]
        table.add_row(
            *_costs(m, result.dense),
            f"{sum(bool(a.right) for a in known)} of {len(known)}" if known else "unknown",
            "-" if m.setting.is_dense else f"{sum(a.same for a in answers)} of {len(answers)}",
        )
    return table
