"""Audio features against recorded outputs of the references, and against slow references written from the definitions."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from goldens import compare, load_golden

from talkingface.core import InputError
from talkingface.data.audio import (MEL_SILENCE, MelSpectrogram, fit_length, inference_starts, load_audio, log_filterbank,
                                    mel_basis, mel_frames, mel_spectrogram, mel_start, mel_window, mel_windows, mfcc,
                                    preemphasis, save_audio, stft_magnitude, to_int16, to_level)


# ---------------------------------------------------------------- the golden of Wav2Lip
@pytest.fixture(scope="module")
def golden():
    return load_golden("wav2lip_mel")


def test_golden(golden):
    "Every recorded output, within the tolerance that comes with it; the mels much closer."
    wav = golden.inputs["wav"]
    reflect, constant = (mel_spectrogram(wav, padding) for padding in ("reflect", "constant"))
    columns = [1 + int(n) // 200 for n in golden.inputs["lengths"]]
    assert columns == [mel_spectrogram(wav[:n]).shape[1] for n in golden.inputs["lengths"]]
    starts = {name: inference_starts(constant.shape[1], float(name)) for name in ("25", "30", "29.97", "24")}
    worst = compare(golden, {
        "mel_reflect": reflect, "mel": constant, "mel_basis": mel_basis(), "preemph": preemphasis(wav),
        "linear": to_level(stft_magnitude(preemphasis(wav), "constant"))[:, ::8],
        "mel_silence": mel_spectrogram(np.zeros((golden.outputs["mel_silence"].shape[1] - 1) * 200), "constant"),
        "chunks_25": np.stack([constant[:, s:s + 16] for s in starts["25"]]),
        "frames_for_length": columns, "chunks25_for_length": [len(inference_starts(c)) for c in columns],
        **{f"chunk_starts_{name}": value for name, value in starts.items()},
    })
    assert len(worst) == len(golden.outputs)
    assert max(worst["mel"], worst["mel_reflect"]) < 1e-6


def test_golden_torch(golden):
    wav = torch.tensor(golden.inputs["wav"])[None]
    compare(golden, {"mel_reflect": MelSpectrogram("reflect")(wav)[0], "mel": MelSpectrogram("constant")(wav)[0]},
            only=("mel", "mel_reflect"))


def test_librosa_agrees_on_the_filters():
    filters = pytest.importorskip("librosa.filters")
    assert np.abs(mel_basis() - filters.mel(sr=16000, n_fft=800, n_mels=80, fmin=55, fmax=7600)).max() < 1e-8


# ---------------------------------------------------------------- torch and NumPy
@pytest.mark.parametrize("padding", ["reflect", "constant"])
@pytest.mark.parametrize("samples", [401, 3200, 16123, 64000])
def test_torch_equals_numpy(padding, samples):
    r = np.random.default_rng(samples)
    wavs = np.stack([r.normal(0, s, samples) for s in (.2, 1e-3, 0)]).clip(-1, 1).astype(np.float32)
    wavs[0, samples // 2:] *= 1e-4                                          # loud beside quiet
    got = MelSpectrogram(padding)(torch.tensor(wavs)).numpy()
    for mine, wav in zip(got, wavs):
        assert np.abs(mine - mel_spectrogram(wav, padding)).max() < 1e-5


def test_gradient_of_the_mel():
    r = np.random.default_rng(0)
    wav = torch.tensor(r.normal(0, .1, (1, 1200)), requires_grad=True)
    part = lambda w: MelSpectrogram()(w)[:, ::16, 2:5]
    assert torch.autograd.gradcheck(part, (wav,), eps=1e-7, atol=1e-3, rtol=1e-3, fast_mode=True)
    silent = torch.zeros(1, 3200, requires_grad=True)
    MelSpectrogram()(silent).sum().backward()
    assert torch.isfinite(silent.grad).all()


def test_mel_module_keeps_its_precision():
    module = torch.nn.Sequential(MelSpectrogram()).half()
    wav = torch.tensor(np.random.default_rng(0).normal(0, .1, (1, 3200)), dtype=torch.float32)
    want = mel_spectrogram(wav[0].numpy())
    assert np.abs(module(wav)[0].numpy() - want).max() < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.abs(module(wav)[0].float().numpy() - want).max() < 1e-5
    assert module(wav.half()).dtype == torch.float16
    assert not list(module.state_dict()) and not list(module.parameters())


# ---------------------------------------------------------------- frames and columns
def test_columns_follow_the_formula():
    assert [mel_start(f) for f in range(-3, 2000)] == [int(80 * f / 25) for f in range(-3, 2000)]


@pytest.mark.parametrize("frames", [5, 6, 29, 100, 1501])
def test_positions_of_a_clip(frames):
    mel = mel_spectrogram(fit_length(np.random.default_rng(0).normal(0, .1, 100), frames))
    assert mel_frames(mel.shape[1]) == frames - 4
    assert mel_window(mel, frames - 5).shape == (80, 16)
    with pytest.raises(InputError, match=f"windows start at frames 0..{frames - 5}"):
        mel_window(mel, frames - 4)
    with pytest.raises(InputError):
        mel_window(mel, -1)


def test_a_click_lies_in_the_windows_of_its_frames():
    "A click in frame 40 lies in exactly the windows that contain frame 40."
    wav = np.zeros(640 * 80)
    wav[40 * 640 + 320] = .9
    mel = mel_spectrogram(wav)
    loud = [f for f in range(mel_frames(mel.shape[1])) if mel_window(mel, f).max() > MEL_SILENCE]
    assert set(range(36, 41)) <= set(loud) <= set(range(35, 42))            # the STFT window of 50 ms spills by a frame


def test_windows_over_the_ends():
    mel = mel_spectrogram(np.random.default_rng(0).normal(0, .1, 6400))     # 10 frames, 33 columns
    got = mel_windows(mel, range(-6, 12))
    for f, window in zip(range(-6, 12), got):
        for k in range(16):
            column = mel_start(f) + k
            assert np.array_equal(window[:, k], mel[:, column] if 0 <= column < 33 else np.full(80, MEL_SILENCE))
    assert got.dtype == np.float32


# ---------------------------------------------------------------- MFCC and filter bank, against loops
def slow_filterbank(samples):
    "Energies of 26 filters by loops over windows, filters and bins, after the definition of python_speech_features."
    y = [float(samples[0])] + [float(samples[i]) - .97 * float(samples[i - 1]) for i in range(1, len(samples))]
    count = 1
    while 400 + (count - 1) * 160 < len(y):
        count += 1
    y += [0.] * (400 + (count - 1) * 160 - len(y))
    top = 2595 * np.log10(1 + 8000 / 700)
    corners = [int(np.floor(513 * (700 * (10 ** (m * top / 27 / 2595) - 1)) / 16000)) for m in range(28)]
    energies, totals = [], []
    phases = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)
    for n in range(count):
        power = np.abs(phases @ np.array(y[160 * n:160 * n + 400])) ** 2 / 512
        row = []
        for j in range(26):
            left, peak, right = corners[j:j + 3]
            value = 0.
            for b in range(left, peak):
                value += power[b] * (b - left) / (peak - left)
            for b in range(peak, right):
                value += power[b] * (right - b) / (right - peak)
            row.append(value or np.finfo(float).eps)
        energies.append(row)
        totals.append(power.sum() or np.finfo(float).eps)
    return np.array(energies), np.array(totals)


@pytest.fixture(scope="module", params=[640, 6400, 16123, 300])
def random_int16(request):
    return np.random.default_rng(request.param).integers(-20000, 20000, request.param).astype(np.int16)


def test_mfcc_by_loops(random_int16):
    from scipy.fft import dct
    energies, totals = slow_filterbank(random_int16)
    want = dct(np.log(energies), type=2, axis=1, norm="ortho")[:, :13]
    want *= 1 + 22 / 2 * np.sin(np.pi * np.arange(13) / 22)                 # lifter 22
    want[:, 0] = np.log(totals)
    got = mfcc(random_int16)
    assert got.shape == want.T.shape
    np.testing.assert_allclose(got, want.T, rtol=1e-7, atol=1e-7)


def test_log_filterbank_by_loops(random_int16):
    rows = np.log(slow_filterbank(random_int16)[0]).astype(np.float32)
    while len(rows) % 4:
        rows = np.concatenate([rows, np.zeros((1, 26), np.float32)])
    want = rows.reshape(-1, 104)
    np.testing.assert_allclose(log_filterbank(random_int16), want, atol=2e-6)
    for frames in (1, len(want), len(want) + 3):
        got = log_filterbank(random_int16, frames)
        assert got.shape == (frames, 104) and got.dtype == np.float32
        np.testing.assert_allclose(got[:len(want)], want[:frames], atol=2e-6)
        assert not got[len(want):].any()


def test_layer_norm_of_the_filter_bank(random_int16):
    plain = torch.tensor(log_filterbank(random_int16, 5))
    want = torch.nn.functional.layer_norm(plain, (104,)).numpy()
    np.testing.assert_allclose(log_filterbank(random_int16, 5, normalise=True), want, atol=1e-5)


def test_float_and_int16_sound_give_the_same(random_int16):
    floats = random_int16.astype(np.float32) / 32768
    assert np.array_equal(mfcc(floats), mfcc(random_int16))
    assert np.array_equal(log_filterbank(floats), log_filterbank(random_int16))


@pytest.mark.parametrize("frames", [5, 29, 100])
def test_lengths_for_a_clip(frames):
    wav = np.zeros(640 * frames)
    assert mfcc(wav).shape == (13, 4 * frames - 1) and log_filterbank(wav).shape == (frames, 104)


# ---------------------------------------------------------------- input
@pytest.mark.parametrize("function", [mel_spectrogram, mfcc, log_filterbank])
@pytest.mark.parametrize("wav, says", [
    (np.zeros((2, 16000)), "average the channels"), (np.zeros(0), "at least"), (np.full(1600, np.nan), "NaN"),
])
def test_unusable_sound(function, wav, says):
    with pytest.raises(InputError, match=says):
        function(wav)


def test_too_short_for_the_mel():
    with pytest.raises(InputError, match="at least 401 samples, got 400"):
        mel_spectrogram(np.zeros(400))
    with pytest.raises(InputError, match="more than 400 samples"):
        MelSpectrogram()(torch.zeros(1, 400))
    with pytest.raises(InputError, match="the sound is too short"):
        inference_starts(15)


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_int16_round_trip(tmp_path, name, rate):
    samples = np.random.default_rng(0).integers(-32768, 32768, 30011).astype(np.int16)
    samples[:2] = -32768, 32767
    path = save_audio(tmp_path / name, samples, rate)
    assert np.array_equal(to_int16(load_audio(path, rate)), samples)
    assert path.read_bytes() == save_audio(tmp_path / f"again{path.suffix}", samples / 32768, rate).read_bytes()


def test_fit_length():
    wav = np.arange(1000.)
    assert np.array_equal(fit_length(wav, 1), wav[:640])
    assert fit_length(wav, 3).shape == (1920,) and fit_length(wav, 3)[1000:].max() == 0
    assert fit_length(wav[None], 2).shape == (1, 1280)


def test_features_need_torch_and_numpy_only():
    code = ("import sys\nfor m in 'av librosa scipy soxr soundfile cv2 pandas skimage'.split(): sys.modules[m] = None\n"
            "import numpy as np, torch\nfrom talkingface.data.audio import *\nw = np.zeros(3200, np.float32)\n"
            "mel_spectrogram(w), MelSpectrogram()(torch.tensor(w)[None]), mfcc(w), log_filterbank(w)")
    subprocess.run([sys.executable, "-c", code], check=True)
