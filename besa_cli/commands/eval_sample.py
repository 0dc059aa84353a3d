"""`besa eval sample`: how a stage and the dense model it was made from continue a prompt."""

import functools
from typing import Annotated

import typer

from besa_cli.commands.shared import options, panels
from besa_cli.commands.shared import subject as subjects
from besa_cli.console import Console

_PROMPT = "The capital of France is"


def sample(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Prompt.")] = _PROMPT,
    model: options.AnyModelOption = None,
    tokens: Annotated[
        int, panels.MEASUREMENT("--tokens", "Tokens to add to the prompt.", min=1, max=options.MOST, metavar="N")
    ] = 40,
    dtype: options.DtypeOption = "auto",
    run: subjects.RunOption = None,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show how the dense and the pruned model continue a prompt (greedy decoding), side by side.

    Both are stored in the run directory, where besa report finds them.

    Examples:

        besa eval sample
        besa eval sample "Once upon a time" --tokens 100 --run qwen
        besa eval sample "1, 2, 3," --model Qwen/Qwen3-0.6B
    """
    console = Console(json=as_json)
    from besa_cli.evaluation import continuations
    from besa_cli.inference import generating, loading, prompts
    from besa_cli.inference.generating import Sampling
    from besa_cli.system import compute, lock

    computed = compute.dtype(dtype, compute.device("cpu"))
    subject = subjects.find(model, run, console, exports=True)
    digest = subjects.digest(subject)  # refuses a damaged stage
    if subject.results is not None:
        lock.require_writable(subject.results.parent)
    models = [measured for measured in (subject.baseline, subject) if measured is not None]
    tokenizers = [subjects.tokenizer(measured, console.note) for measured in models]
    encoded = [
        prompts.encode_text(measured.directory, tokenizer, prompt)
        for measured, tokenizer in zip(models, tokenizers, strict=True)
    ]
    for measured, inputs in zip(models, encoded, strict=True):
        prompts.require_room(measured.directory, inputs, tokens, "--tokens")
    texts = {}
    for measured, tokenizer, inputs in zip(models, tokenizers, encoded, strict=True):
        with console.blocks(measured.name, 1) as progress:
            show = functools.partial(progress.step, total=tokens, phase="token")
            whole = loading.load(measured.directory, computed)
            generated = generating.generate(whole, tokenizer, inputs, Sampling(tokens=tokens), on_token=show)
            texts[measured.name] = generated.text
            del whole  # before the next model is loaded
        if subject.results is not None:
            result = continuations.Continuation(
                model_digest=digest if measured is subject else str(measured.digest),
                prompt=prompt,
                tokens=tokens,
                dtype=compute.name_of(computed),
                text=texts[measured.name],
            )
            continuations.save(result, subject.results, {"name": measured.name, "directory": str(measured.directory)})
    console.table(
        f"{prompt} …", ("model", "continuation"), [(name, " ".join(text.split())) for name, text in texts.items()]
    )
    console.emit_json({"prompt": prompt, "tokens": tokens, "continuations": texts})
