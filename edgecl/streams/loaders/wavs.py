"""A folder of recordings, one word each, as log-mel spectrograms."""

import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl.streams.dataset import Dataset
from edgecl.streams.loaders._files import DAMAGED, folder_of, index
from edgecl_device.checks import as_int, short
from edgecl_device.errors import EdgeclError, InputError

NAME = re.compile(r"(?P<label>[^_]+)_(?P<group>[^_]+)_(?P<index>[0-9]+)\.wav")
"""How the Free Spoken Digit Dataset names its files: ``{digit}_{speaker}_{index}.wav``."""


FEWEST_MELS = 3
"""What kaldi-native-fbank takes."""

LONGEST_S, HIGHEST_HZ, MOST_MELS = 3600, 1 << 20, 1024
"""Beyond these a number is a slip or a damaged header, and would fill the memory with silence."""


def load_wavs(folder: str | Path, *, seconds: float = 1.0, mels: int = 40, test_below: int = 5) -> Dataset:
    """Load ``{label}_{speaker}_{index}.wav`` as log-mel spectrograms: the layout of the Free Spoken Digit Dataset.

    A recording is mono PCM of 16 bits; all have one sample rate. It is cut, or filled up with silence at its end, to
    ``seconds``, scaled to -1..1, and turned into the logarithm of ``mels`` filter-bank energies by kaldi-native-fbank: Kaldi's
    filter banks, windows of 25 ms every 10 ms, pre-emphasis 0.97, no dither. Silence is log(1.19e-7) = -15.9.

    Args:
        folder: Holds the recordings; files of other types are left alone.
        seconds: Length of every spectrogram.
        mels: Number of filters, from 20 Hz to half the sample rate.
        test_below: Recordings with an index below this one are the test set; 5 is the Free Spoken Digit Dataset's own split.

    Returns:
        Spectrograms float32 [N, 1, frames, mels], labels, and speakers as groups; sorted by label, speaker and index.

    Raises:
        InputError: when a name, format or rate is another, a file is damaged or cut off, a part is empty, or ``seconds`` or
            ``mels`` do not fit the sample rate.
        EdgeclError: when kaldi-native-fbank is not installed.

    Source: Z. Jackson et al., Free Spoken Digit Dataset; D. Povey et al., The Kaldi Speech Recognition Toolkit, 2011.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("7_ann_0.wav", "7_bob_5.wav"):
    ...         with wave.open(str(Path(folder) / name), "wb") as file:
    ...             file.setparams((1, 2, 8000, 0, "NONE", ""))
    ...             file.writeframes(bytes(2 * 800))
    ...     data = load_wavs(folder)
    >>> data.x.shape, data.class_names, data.group_names, data.group_test, round(float(data.x.max()), 1)
    ((1, 1, 98, 40), ('7',), ('ann', 'bob'), array([0]), -15.9)
    """
    place = folder_of(folder)
    found = [(_parsed(path), path) for path in sorted(place.glob("*.wav"))]
    found.sort(key=lambda entry: entry[0])
    if not found:
        raise InputError(f"{place}: must hold files named LABEL_SPEAKER_INDEX.wav, got none; give the folder of the recordings")
    paths = [path for _, path in found]
    sounds = [_samples(path) for path in paths]
    rate = sounds[0][0]
    for path, (other, _) in zip(paths, sounds, strict=True):
        if other != rate:
            raise InputError(f"{path}: must have a sample rate of {rate} Hz as {paths[0].name}, got {other}; resample it")
    x = np.stack([log_mel(samples, rate, seconds=seconds, mels=mels) for _, samples in sounds])[:, None]
    y, class_names = index(label for (label, _, _), _ in found)
    group, group_names = index(speaker for (_, speaker, _), _ in found)
    test = np.array([number < test_below for (_, _, number), _ in found])
    if test.all() or not test.any():
        raise InputError(f"test_below: must leave recordings for training and for the test, got {test_below}; choose an index between")
    return Dataset(x[~test], y[~test], x[test], y[test], class_names, group[~test], group[test], group_names)


def log_mel(samples: NDArray[np.int16], rate_hz: int, *, seconds: float = 1.0, mels: int = 40) -> NDArray[np.float32]:
    """Log-mel spectrogram of one recording, as :func:`load_wavs` makes it.

    Args:
        samples: int16 [S].
        rate_hz: Samples a second.
        seconds: Length that it is cut or filled up to.
        mels: Number of filters.

    Returns:
        float32 [frames, mels]; ``frames = 1 + (seconds - 0.025) // 0.010``.

    Raises:
        InputError: when ``seconds`` is shorter than one window, or ``mels`` are fewer than 3 or too many for the sample rate.
        EdgeclError: when kaldi-native-fbank is not installed.

    >>> log_mel(np.zeros(8000, np.int16), 8000).shape
    (98, 40)
    """
    try:
        import kaldi_native_fbank as knf
    except ImportError as error:
        raise EdgeclError("kaldi-native-fbank is not installed; install it with: pip install 'edgecl[audio]'") from error
    if not 0.025 <= seconds <= LONGEST_S:
        raise InputError(f"seconds: must be from 0.025, one window, to {LONGEST_S}, got {seconds}; pass 1.0")
    if not FEWEST_MELS <= as_int("mels", mels) <= MOST_MELS:
        raise InputError(f"mels: must be from {FEWEST_MELS} to {MOST_MELS}, got {short(mels)}; pass 40 at 8 kHz")
    options: Any = knf.FbankOptions()
    options.frame_opts.samp_freq = rate_hz
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = int(mels)
    try:
        bank = knf.OnlineFbank(options)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"mels: must fit a sample rate of {rate_hz} Hz, got {mels}; pass fewer, 40 at 8 kHz") from error
    length = round(seconds * rate_hz)
    filled = np.zeros(length, np.float32)
    filled[: len(samples)] = samples[:length] / np.float32(1 << 15)
    bank.accept_waveform(rate_hz, filled)
    bank.input_finished()
    return np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)])


def _parsed(path: Path) -> tuple[str, str, int]:
    """Label, speaker and index from a file's name."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise InputError(f"{path}: must be named LABEL_SPEAKER_INDEX.wav, got {path.name!r}; rename it or move it away")
    return match["label"], match["group"], int(match["index"])


def _samples(path: Path) -> tuple[int, NDArray[np.int16]]:
    """Sample rate in Hz and samples int16 [S] of one recording."""
    try:
        with wave.open(str(path), "rb") as file:
            kind, frames = (file.getnchannels(), 8 * file.getsampwidth()), file.getnframes()
            rate, content = file.getframerate(), file.readframes(frames)
    except (OSError, EOFError, RuntimeError, wave.Error) as error:  # RuntimeError: a chunk's size is beyond its file
        raise InputError(f"{path}: must be a PCM wav file, got {str(error) or 'its end'}; convert it or get it again") from error
    if kind != (1, 16):
        raise InputError(f"{path}: must have 1 channel of 16 bits, got {kind[0]} of {kind[1]} bits; convert it")
    if rate > HIGHEST_HZ:
        raise InputError(f"{path}: must have a sample rate of at most {HIGHEST_HZ:,} Hz, got {rate:,}; {DAMAGED}")
    if len(content) != 2 * frames or not frames:
        raise InputError(f"{path}: must have {frames} samples, as its header says, and at least 1, got {len(content) // 2}; {DAMAGED}")
    return rate, np.frombuffer(content, "<i2").astype(np.int16)
