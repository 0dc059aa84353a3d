"""Samples of the sources of a calibration set: from one pool of documents, or from each its share of a mixture."""

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

from besa_cli.calibration import sampling
from besa_cli.checkpoint import manifests
from besa_cli.system.notes import Notify
from besa_cli.text import corpora, mixture, tokenizing
from besa_cli.text.chat import RenderedConversation
from besa_cli.text.spool import Text

Drawn = tuple[sampling.Windows, manifests.CalibrationOrigin]  # windows, and what the manifest says about them
Write = Callable[[int, int], Drawn]  # from the numbers of samples and of windows beside them


class SampleTokenizer(tokenizing.Tokenizer, Protocol):
    """Protocol of the tokenizers used for sampling; those of transformers satisfy it."""

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-text token, which separates packed documents."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Way to draw windows from documents.

    Attributes
    ----------
    tokenizer : SampleTokenizer
        The model's tokenizer.
    seqlen : int
        Tokens of a window.
    seed : int
    pack : bool or None
        See `besa_cli.calibration.calibration_set.CalibrationOptions`.
    notify : callable
        Called with a one-line note if other text replaces the requested one.
    """

    tokenizer: SampleTokenizer
    seqlen: int
    seed: int
    pack: bool | None
    notify: Notify

    def draw(self, opened: Sequence[corpora.Corpus], samples: int, held_out: int) -> Drawn:
        """Draw windows from the documents of all sources, which are one pool."""
        with_bundled = any(corpus.source == "bundled" for corpus in opened)
        packed = with_bundled or any(corpus.template for corpus in opened) if self.pack is None else self.pack
        for corpus in opened:
            if corpus.note:
                self.notify(corpus.note + (", packed to full windows" if packed else ""))
        pool = sampling.Joined([corpus.documents for corpus in opened])
        sizes = {"samples": samples, "seqlen": self.seqlen, "held_out": held_out}
        encode = self._encoder()
        if not packed:
            drawn = sampling.draw(pool, encode, seed=self.seed, **sizes)
            sources = [_source(corpus) for corpus in opened]
            return drawn, {"sources": sources, "sampling": "documents", "documents": drawn.documents}
        books: list[corpora.Corpus] = []
        texts = chain(sampling.shuffled(pool, self.seed), _books(opened, books) if with_bundled else ())
        separator = self.tokenizer.eos_token_id
        packed_windows = sampling.pack(texts, encode, separator=separator, **sizes)
        return packed_windows, {
            "sources": [_source(corpus) for corpus in (*opened, *books)],
            "sampling": "packed",
            "documents": packed_windows.documents,
            "separator": separator,
        }

    def _encoder(self) -> sampling.Encode:
        """Return the function from a text to its ids: conversations contain their special tokens, others get them."""
        plain, complete = tokenizing.Encoder(self.tokenizer), tokenizing.Encoder(self.tokenizer, special=False)

        def encode(text: Text) -> Iterable[int]:
            return (complete if isinstance(text, RenderedConversation) else plain)(text)

        return encode


def draw_mixture(
    sources: Sequence[mixture.WeightedSource],
    draw: Callable[[mixture.WeightedSource, int, int], Drawn],
    *,
    samples: int,
    held_out: int,
    seed: int,
    notify: Notify,
) -> Drawn:
    """Draw from every source its share of the samples, and mix them in an order that the seed determines.

    Parameters
    ----------
    sources : sequence of WeightedSource
        All have weights.
    draw : callable
        Draw so many samples, and so many windows beside them, from a source.
    samples, held_out : int
        Number of all samples, and of windows beside them; fewer of these where a source has too little text.
    seed : int
    notify : callable
        Called with a one-line note for a source whose share is less than a sample.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    counts, others = mixture.shares(weights, samples), mixture.shares(weights, held_out)
    rows: list[array[int]] = []
    beside: list[array[int]] = []
    parts: list[manifests.CalibrationOrigin] = []
    for source, count, other in zip(sources, counts, others, strict=True):
        if not count:
            notify(f"--data {source.asked} is left out: its share of {samples} samples is less than one")
            continue
        windows, origin = draw(replace(source, asked=source.name), count, other)
        weight = source.asked.rpartition(":")[2]
        parts.append({**origin, "sources": [_of_mixture(each, weight, count, origin) for each in origin["sources"]]})
        rows += windows.tokens
        beside += windows.held_out
    random.Random(seed).shuffle(rows)
    mixed: manifests.CalibrationOrigin = {
        "sources": [source for part in parts for source in part["sources"]],
        "sampling": "mixture",
        "documents": sum(part.get("documents", 0) for part in parts),
    }
    separators = [part["separator"] for part in parts if "separator" in part]
    if separators:
        mixed["separator"] = separators[0]
    return sampling.Windows(tokens=rows, documents=mixed["documents"], held_out=beside), mixed


def _of_mixture(
    source: manifests.SourceRecord, weight: str, samples: int, origin: manifests.CalibrationOrigin
) -> manifests.SourceRecord:
    return {**source, "weight": weight, "samples": samples, "sampling": origin["sampling"]}


def _books(opened: Sequence[corpora.Corpus], used: list[corpora.Corpus]) -> Iterator[Text]:
    """Yield the texts of the bundled books; each book is appended to `used` when it is read."""
    asked = next(corpus.asked for corpus in opened if corpus.source == "bundled")
    for name in corpora.BOOKS:
        used.append(corpora.book(name, asked))
        yield from used[-1].documents


def _source(corpus: corpora.Corpus) -> manifests.SourceRecord:
    source: manifests.SourceRecord = {
        "asked": corpus.asked,
        "source": corpus.source,
        "file": corpus.file,
        "sha256": corpus.digest,
    }
    if corpus.source == "file":
        source["asked"] = corpus.file  # the name alone: a path would reveal the user's directories
    if corpus.revision is not None:
        source["revision"] = corpus.revision
    if corpus.template is not None:
        source["chat_template"] = corpus.template
    return {**source, "documents": len(corpus.documents)}
