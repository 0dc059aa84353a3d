"""llama.cpp, out of the prebuilt wheel `xllamacpp`, called through its C interface: tokens in, logits out.

pip install xllamacpp
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_ROOM = 1024  # bytes; more than either structure of parameters has
# Where numbers stand in llama_context_params, and what they are by default in the library that this was written for.
_PLACES = {"n_ctx": 0, "n_batch": 1, "n_ubatch": 2, "n_seq_max": 3, "n_threads": 7, "n_threads_batch": 8}
_DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_threads": 4, "n_threads_batch": 4}


class _Parameters(ctypes.Structure):
    """A structure passed by value whose fields are not needed by name, but for the first numbers."""

    _fields_ = (("numbers", ctypes.c_uint32 * (_ROOM // 4)),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def library() -> ctypes.CDLL:
    """The shared library inside the wheel."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise SystemExit("xllamacpp is not installed: pip install xllamacpp")
    (file,) = Path(found.origin).parent.glob("xllamacpp*.so")
    opened = ctypes.CDLL(str(file))
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_model_default_params", _Parameters, []),
        ("llama_context_default_params", _Parameters, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Parameters]),
        ("llama_init_from_model", pointer, [pointer, _Parameters]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
        ("llama_batch_init", _Batch, [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", ctypes.c_int32, [pointer, _Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("llama_log_set", None, [pointer, pointer]),
    ):
        function = getattr(opened, name)
        function.restype, function.argtypes = result, arguments
    opened.llama_tokenize.restype = ctypes.c_int32
    opened.llama_tokenize.argtypes = [
        pointer, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool,
        ctypes.c_bool,
    ]  # fmt: skip
    return opened


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class LlamaCpp:
    """One GGUF file, loaded.

    Parameters
    ----------
    path : Path
    length : int
        Tokens of a window.
    threads : int
    """

    def __init__(self, path: Path, length: int, threads: int) -> None:
        self._library = library()
        self._library.llama_log_set(ctypes.cast(_SILENT, ctypes.c_void_p), None)
        self._library.llama_backend_init()
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.tokens = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        self._length = length
        self._parameters = self._library.llama_context_default_params()
        defaults = {name: self._parameters.numbers[place] for name, place in _PLACES.items()}
        if defaults != _DEFAULTS:
            raise SystemExit(f"this llama.cpp has other parameters than this script knows: {defaults}")
        part = min(length, 512)
        chosen = {"n_ctx": length, "n_batch": part, "n_ubatch": part, "n_threads": threads, "n_threads_batch": threads}
        for name, value in chosen.items():
            self._parameters.numbers[_PLACES[name]] = value

    def logits(self, window: Sequence[int]) -> np.ndarray:
        """Logits of shape (tokens of the window, vocabulary), in fp32."""
        context = self._library.llama_init_from_model(self._model, self._parameters)
        found = []
        for start in range(0, len(window), 512):
            part = window[start : start + 512]
            batch = self._library.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for index, token in enumerate(part):
                batch.token[index], batch.pos[index] = token, start + index
                batch.n_seq_id[index], batch.logits[index] = 1, 1
                batch.seq_id[index][0] = 0
            if self._library.llama_decode(context, batch):
                raise SystemExit("llama_decode failed")
            values = self._library.llama_get_logits(context)
            found.append(np.ctypeslib.as_array(values, shape=(len(part), self.tokens)).copy())
            self._library.llama_batch_free(batch)
        self._library.llama_free(context)
        return np.concatenate(found)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, special tokens read as such, none added."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), False, True)
        return list(ids[:count])

    def close(self) -> None:
        """Free the model."""
        self._library.llama_model_free(self._model)
