"""Media in every state that real files come in: rates, timestamps, rotation, sizes, damage, sound that starts late."""
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest

from talkingface.core import InputError
from talkingface.data.audio import fit_length, load_audio, save_audio
from talkingface.data.video import VideoWriter, probe, read_frames, stream_frames, write_video


# ---------------------------------------------------------------- making files
def numbered(count, height=64, width=128, start=0):
    "Frames that carry their number as eight squares, with a bright corner at the top left."
    frames = np.full((count, height, width, 3), 60, np.uint8)
    for i, frame in enumerate(frames, start):
        for bit in range(8):
            frame[32:56, 8 + 14 * bit:20 + 14 * bit] = 255 * (i >> bit & 1)
        frame[:16, :16] = 255
    return frames


def number(frame):
    return sum(int(frame[44, 14 + 14 * bit].mean() > 127) << bit for bit in range(8))


def numbers(path, **options):
    return [number(f) for f in read_frames(path, **options)]


def encode(path, frames, times=None, fps=25, base=Fraction(1, 90000), codec="libx264", pixels="yuv420p", form=None, **options):
    "Encode frames at `times` (seconds), or at a fixed rate."
    times = [i / fps for i in range(len(frames))] if times is None else times
    with av.open(str(path), "w", format=form) as container:
        video = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt, video.codec_context.time_base = pixels, base
        for image, at in zip(frames, times):
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.pts, picture.time_base = round(at / base), base
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
    return path


def pulses(seconds, rate, at):
    "A narrow pulse at each time of `at`, band-limited so that every codec keeps it."
    t = np.arange(round(seconds * rate)) / rate
    return sum(.8 * np.exp(-((t - c) / .0006) ** 2) for c in at).astype(np.float32)


def encode_sound(path, codec, rate, channels=1, start=0., pictures_from=None, at=(.5, 1.25), seconds=2.):
    "Two pulses in any codec; with pictures from `pictures_from` seconds on."
    wav = np.tile(pulses(seconds, rate, at), (channels, 1))
    with av.open(str(path), "w") as container:
        if pictures_from is not None:
            video = container.add_stream("libx264", rate=25)
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
        audio = container.add_stream(codec, rate=rate, layout="stereo" if channels == 2 else "mono")
        form = {"pcm_s16le": "s16", "flac": "s16", "libopus": "flt"}.get(codec, "fltp")
        audio.codec_context.format = form
        if pictures_from is not None:
            for i in range(50):
                picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                picture.pts, picture.time_base = i + round(25 * pictures_from), Fraction(1, 25)
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
        for k in range(0, wav.shape[1], 1024):
            part = wav[:, k:k + 1024]
            part = np.rint(part * 32767).astype(np.int16) if form == "s16" else part
            part = part if form == "fltp" else part.T.reshape(1, -1)
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format=form, layout=audio.codec_context.layout.name)
            sound.sample_rate, sound.pts, sound.time_base = rate, k + round(start * rate), Fraction(1, rate)
            container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return path


def peaks(wav, rate=16000):
    "Times of the two strongest pulses."
    first = int(np.argmax(wav))
    rest = wav.copy()
    rest[max(0, first - 800):first + 800] = 0
    return sorted([first / rate, int(np.argmax(rest)) / rate])


def turned(path, out, matrix):
    "The same MP4 with another display matrix (a, b, c, d) in its track header."
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 12 + 4 + 4 + 8 + 8
    a, b, c, d = (v << 16 for v in matrix)
    data[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    out.write_bytes(data)
    return out


# ---------------------------------------------------------------- files that are not what they should be
@pytest.mark.parametrize("read", [read_frames, load_audio, probe, lambda p: next(stream_frames(p))])
@pytest.mark.parametrize("name, content, says", [
    ("missing.mp4", None, "no such file"),
    ("empty.mp4", b"", "empty (0 bytes)"),
    ("text.mp4", b"This is a letter, not a video.\n" * 50, "cannot be opened as media"),
    ("random.mp4", bytes(range(256)) * 40, "cannot be opened as media"),
    ("list.mp4", b"#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/a.ts\n", "cannot be opened as media"),
])
def test_not_media(tmp_path, read, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert says in str(error.value) and name in str(error.value) and "expected" in str(error.value)


def test_folder(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        read_frames(tmp_path)


def test_video_without_audio(tmp_path):
    path = write_video(tmp_path / "mute.mp4", numbered(5))
    assert not probe(path).has_audio and probe(path).audio_rate == 0
    with pytest.raises(InputError, match=r"no audio stream, it holds video \(h264\)"):
        load_audio(path)


def test_audio_without_video(tmp_path):
    path = save_audio(tmp_path / "a.wav", np.zeros(1600))
    for read in (read_frames, probe):
        with pytest.raises(InputError, match="no video stream, it holds audio"):
            read(path)


def test_song_with_cover_picture_is_not_a_video(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        audio = container.add_stream("libmp3lame", rate=44100, layout="mono")
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        picture.pts = 0
        container.mux(cover.encode(picture))
        container.mux(cover.encode(None))
        sound = av.AudioFrame.from_ndarray(pulses(1, 44100, [.5])[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 44100, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    with pytest.raises(InputError, match="no video stream"):
        read_frames(path)
    assert abs(np.argmax(load_audio(path)) - 8000) <= 2


# ---------------------------------------------------------------- damage
@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    "A clip whose pictures take many bytes, so that a cut hits the middle; the index stands at the front."
    frames = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    return write_video(tmp_path_factory.mktemp("noisy") / "noisy.mp4", frames, wav=np.zeros(38400), crf=30)


def test_cut_off_before_the_index(tmp_path, noisy):
    plain = encode(tmp_path / "plain.mp4", read_frames(noisy))             # index at the end
    short = tmp_path / "short.mp4"
    short.write_bytes(plain.read_bytes()[:plain.stat().st_size // 2])
    for read in (read_frames, probe, load_audio):
        with pytest.raises(InputError, match="cannot be opened"):
            read(short)
    with pytest.raises(InputError, match="cannot be opened"):
        read_frames(short, allow_partial=True)


@pytest.mark.parametrize("keep", [.3, .5, .8])
def test_cut_off_midway(tmp_path, noisy, keep):
    short = tmp_path / "short.mp4"
    short.write_bytes(noisy.read_bytes()[:int(noisy.stat().st_size * keep)])
    with pytest.raises(InputError, match=r"only \d+ pictures could be read .* allow_partial=True") as error:
        read_frames(short)
    readable = int(str(error.value).split("only ")[1].split()[0])
    assert 60 * keep * .6 < readable < 60
    assert len(read_frames(short, allow_partial=True)) == readable
    assert np.array_equal(read_frames(short, allow_partial=True), read_frames(noisy)[:readable])
    with pytest.raises(InputError, match="s of sound could be read"):
        load_audio(short)
    assert 0 < len(load_audio(short, allow_partial=True)) < 38400
    with pytest.raises(InputError, match="cut off"):
        probe(short)


@pytest.mark.parametrize("junk", [0, 255])
def test_damaged_midway(tmp_path, noisy, junk):
    data = bytearray(noisy.read_bytes())
    data[len(data) // 2:len(data) // 2 + 3000] = bytes([junk]) * 3000
    (tmp_path / "hole.mp4").write_bytes(data)
    with pytest.raises(InputError, match=r"only \d+ pictures could be read"):
        read_frames(tmp_path / "hole.mp4")
    assert 10 < len(read_frames(tmp_path / "hole.mp4", allow_partial=True)) < 60


# ---------------------------------------------------------------- time
@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("fps", [10, 12.5, 24000 / 1001, 24, 25, 30000 / 1001, 30, 50, 59.94, 60])
def test_any_rate(tmp_path, fps, container):
    path = encode(tmp_path / f"clip.{container}", numbered(100), fps=fps)
    got = numbers(path)
    assert abs(len(got) - 100 / fps * 25) <= .5 + 1e-6
    slack = {"mp4": .0001, "mkv": .0015}[container]                        # Matroska rounds to a millisecond, twice
    for i, n in enumerate(got[:-1]):
        assert (n / fps <= i / 25 + slack) and (i / 25 - slack < (n + 1) / fps), (i, n)
    assert numbers(path, fps=None) == list(range(100)) == numbers(path, fps=None, threads=2)
    info = probe(path)
    assert info.frames == 100 and abs(info.fps - fps) < .05 and abs(info.seconds - 100 / fps) < .002


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_variable_rate(tmp_path, container):
    gaps = np.random.default_rng(1).uniform(.011, .12, 99)
    times = np.concatenate([[0], np.cumsum(gaps)])
    path = encode(tmp_path / f"vfr.{container}", numbered(100), times)
    got = numbers(path)
    assert abs(len(got) / 25 - times[-1]) < .15
    for i, n in enumerate(got):
        shown = np.searchsorted(times, i / 25, side="right") - 1
        near = np.abs(times - i / 25).min() < .0015                        # a change of picture just then: either is right
        assert n == shown or (near and abs(n - shown) == 1), (i, n, shown)


def test_long_pause_repeats_the_picture(tmp_path):
    path = encode(tmp_path / "slides.mp4", numbered(3), [0, 2, 2.04])
    assert numbers(path)[:52] == [0] * 50 + [1, 2]


def test_first_picture_is_time_zero(tmp_path):
    path = encode(tmp_path / "late.mkv", numbered(30), [1.234 + i / 25 for i in range(30)])
    assert numbers(path) == list(range(30))


@pytest.mark.parametrize("name, form", [("bare.h264", "h264"), ("b.avi", None), ("b.ts", None)])
def test_no_or_odd_timestamps(tmp_path, name, form):
    path = encode(tmp_path / name, numbered(30), form=form, base=Fraction(1, 25))
    assert numbers(path) == list(range(30))
    assert probe(path).frames == 30


def test_timestamps_that_jump_back(tmp_path):
    "Two recordings joined in one transport stream: the second goes on where the first ended."
    parts = [encode(tmp_path / f"{k}.ts", numbered(25, start=25 * k), base=Fraction(1, 25)).read_bytes() for k in range(2)]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    got = numbers(tmp_path / "joined.ts", fps=None)
    assert got == list(range(50))
    assert 45 <= len(read_frames(tmp_path / "joined.ts")) <= 55


# ---------------------------------------------------------------- pictures
@pytest.mark.parametrize("matrix, degrees, expected", [
    ((1, 0, 0, 1), 0, lambda f: f),
    ((0, 1, -1, 0), 90, lambda f: np.rot90(f, -1, axes=(1, 2))),
    ((-1, 0, 0, -1), 180, lambda f: np.rot90(f, 2, axes=(1, 2))),
    ((0, -1, 1, 0), 270, lambda f: np.rot90(f, 1, axes=(1, 2))),
    ((-1, 0, 0, 1), 0, lambda f: f[:, :, ::-1]),
])
def test_rotation(tmp_path, matrix, degrees, expected):
    plain = write_video(tmp_path / "plain.mp4", numbered(5))
    path = turned(plain, tmp_path / "turned.mp4", matrix)
    want = expected(read_frames(plain))
    assert np.array_equal(read_frames(path), want)
    info = probe(path)
    assert (info.rotation, info.height, info.width) == (degrees, *want.shape[1:3])


@pytest.mark.parametrize("height, width", [(65, 128), (64, 129), (65, 129)])
def test_odd_sizes(tmp_path, height, width):
    frames = numbered(6, height, width)
    got = read_frames(write_video(tmp_path / "odd.mp4", frames))           # written: one line of edge is added
    assert got.shape == (6, height + height % 2, width + width % 2, 3)
    assert [number(f) for f in got] == list(range(6))
    assert np.abs(got[:, :height, :width].astype(int) - frames).mean() < 3
    odd = encode(tmp_path / "odd.mkv", frames, codec="ffv1", pixels="yuv444p")
    assert read_frames(odd).shape == frames.shape                          # read: kept as it is
    assert (probe(odd).height, probe(odd).width) == (height, width)


def test_pixels_that_are_not_square(tmp_path):
    path = tmp_path / "anamorphic.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        video.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for i in range(5):
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), format="rgb24")
            picture.pts = i
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
    assert read_frames(path).shape == (5, 64, 128, 3)
    assert (probe(path).width, probe(path).height) == (128, 64)


def test_colours(tmp_path):
    "Saturated colours come back; BT.709 files are read as BT.709."
    colours = np.array([(200, 60, 40), (30, 160, 80), (40, 60, 210), (230, 200, 60)], np.uint8)
    frames = np.repeat(colours[:, None, None], 64, 1).repeat(64, 2)
    got = read_frames(write_video(tmp_path / "c.mp4", frames, crf=10))
    assert np.abs(got.astype(int) - frames).max() <= 3
    tagged = tmp_path / "hd.mp4"                                           # the red of BT.709: Y, Cb, Cr = 63, 102, 240
    with av.open(str(tagged), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"qp": "1"})
        video.width = video.height = 64
        video.pix_fmt, video.codec_context.colorspace = "yuv420p", 1
        picture = av.VideoFrame(64, 64, "yuv420p")
        for plane, value in zip(picture.planes, (63, 102, 240)):
            plane.update(bytes([value]) * plane.buffer_size)
        picture.pts, picture.colorspace = 0, 1
        container.mux(video.encode(picture))
        container.mux(video.encode(None))
    assert np.abs(read_frames(tagged)[0, 32, 32].astype(int) - (255, 0, 0)).max() <= 6


def test_memory_is_bounded(tmp_path):
    def still():
        for i in range(600):
            yield np.full((128, 128, 3), i % 200, np.uint8)
    path = write_video(tmp_path / "long.mp4", still())
    tracemalloc.start()
    count = sum(len(chunk) for chunk in stream_frames(path, chunk=8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 600
    assert peak < 128 * 128 * 3 * 8 * 6, peak                              # 600 frames would be 29 MB; eight are .4 MB


# ---------------------------------------------------------------- writing
def test_identical_bytes_in_another_process(tmp_path):
    code = ("import numpy as np; from talkingface.data.video import write_video; r = np.random.default_rng(0); "
            "write_video({!r}, r.integers(0, 256, (30, 64, 64, 3), dtype=np.uint8), wav=r.normal(0, .1, 19200))")
    for name in "ab":
        subprocess.run([sys.executable, "-c", code.format(str(tmp_path / f"{name}.mp4"))], check=True,
                       env={**os.environ, "OMP_NUM_THREADS": {"a": "1", "b": "4"}[name]})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_failure_leaves_nothing(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(5))
    before = (tmp_path / "clip.mp4").read_bytes()
    with pytest.raises(RuntimeError):
        with VideoWriter(tmp_path / "clip.mp4") as writer:
            writer.write(numbered(20))
            raise RuntimeError
    with pytest.raises(InputError, match="no frames"):
        write_video(tmp_path / "clip.mp4", [])
    with pytest.raises(InputError, match="all frames need one size"):
        write_video(tmp_path / "clip.mp4", [numbered(1), numbered(1, 96)])
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == before                  # the earlier file is untouched


def test_kill_leaves_no_file(tmp_path):
    code = ("import sys, numpy as np; from talkingface.data.video import VideoWriter\n"
            "with VideoWriter(sys.argv[1]) as w:\n"
            "    while True: w.write(np.zeros((64, 64, 3), np.uint8)); print('.', flush=True)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "clip.mp4")], stdout=subprocess.PIPE)
    for _ in range(50):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "clip.mp4").exists()
    assert len(read_frames(write_video(tmp_path / "clip.mp4", numbered(5)))) == 5


@pytest.mark.parametrize("bad, says", [
    (np.zeros((2, 3, 64, 64), np.uint8), "channels last"),
    (np.zeros((2, 64, 64, 3), np.float32), "0..255"),
    (np.zeros((64, 64), np.uint8), "expected RGB frames"),
])
def test_frames_of_a_wrong_kind(tmp_path, bad, says):
    with pytest.raises(InputError, match=says):
        with VideoWriter(tmp_path / "x.mp4") as writer:
            writer.write(bad)


def test_sound_and_names_of_a_wrong_kind(tmp_path):
    with pytest.raises(InputError, match="average the channels"):
        VideoWriter(tmp_path / "x.mp4", wav=np.zeros((2, 100)))
    with pytest.raises(InputError, match=".mp4 or .mov"):
        VideoWriter(tmp_path / "x.gif")


# ---------------------------------------------------------------- sound in its place
@pytest.mark.parametrize("samples", [20000, 32000, 50000])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_sound_is_as_long_as_the_pictures(tmp_path, samples, name):
    wav = np.random.default_rng(0).normal(0, .1, samples).astype(np.float32)
    path = write_video(tmp_path / name, numbered(50), wav=wav)
    got = load_audio(path)
    assert len(got) == 32000 and len(read_frames(path)) == 50
    if name.endswith("mov"):
        assert np.abs(got - fit_length(wav, 50)).max() <= .5 / 32768 + 1e-9


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
@pytest.mark.parametrize("frames", [29, 50, 101])
def test_click_stays_in_place(tmp_path, rate, frames):
    wav = np.zeros(frames * rate // 25, np.float32)
    places = np.array([round(.3 * rate), len(wav) - rate // 20])
    wav[places] = .9
    path = write_video(tmp_path / "click.mp4", np.zeros((frames, 32, 32, 3), np.uint8), wav=wav, sample_rate=rate)
    got = load_audio(path, sample_rate=rate)
    assert len(got) == len(wav)
    assert np.array_equal(np.sort(np.argsort(-np.abs(got))[:2]), places)


def test_flash_and_click_at_other_rates(tmp_path):
    "A white frame and a click at the same time stay together through a 29.97 fps file."
    fps, rate = 30000 / 1001, 48000
    frames = np.zeros((90, 32, 32, 3), np.uint8)
    frames[45] = 255
    wav = np.zeros(3 * rate, np.float32)
    wav[round(45 / fps * rate)] = .9
    path = write_video(tmp_path / "f.mp4", frames, fps=fps, wav=wav, sample_rate=rate)
    flash = int(np.argmax(read_frames(path).mean((1, 2, 3)))) / 25
    click = int(np.argmax(load_audio(path))) / 16000
    assert abs(click - 45 / fps) < .0002 and 0 <= flash - click < .04


@pytest.mark.parametrize("name, codec, rate, channels", [
    ("a.wav", "pcm_s16le", 8000, 2), ("b.wav", "pcm_s16le", 44100, 1), ("c.flac", "flac", 48000, 2),
    ("d.mp3", "libmp3lame", 44100, 2), ("e.mp3", "libmp3lame", 16000, 1), ("f.m4a", "aac", 44100, 2),
    ("g.m4a", "aac", 48000, 1), ("h.ogg", "libopus", 48000, 2), ("i.mkv", "aac", 44100, 1),
])
def test_codecs_and_rates(tmp_path, name, codec, rate, channels):
    got = load_audio(encode_sound(tmp_path / name, codec, rate, channels))
    assert got.dtype == np.float32 and got.ndim == 1
    assert abs(len(got) - 32000) <= (0 if not name.endswith("mkv") else 400)
    assert np.abs(np.array(peaks(got)) - (.5, 1.25)).max() <= 2 / 16000
    assert .74 < got.max() < .82                                           # channels are averaged, not added


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.ts"])
@pytest.mark.parametrize("start, pictures_from", [(0, 0), (.3, 0), (0, .2)])
def test_sound_that_starts_at_another_time(tmp_path, name, start, pictures_from):
    got = load_audio(encode_sound(tmp_path / name, "aac", 44100, 1, start, pictures_from))
    want = np.array([.5, 1.25]) + start - pictures_from
    assert np.abs(np.array(peaks(got)) - want).max() < .0012               # the containers round the start to a millisecond


def test_gap_in_the_sound(tmp_path):
    path = tmp_path / "gap.mkv"
    tone = (.5 * np.sin(np.arange(8000) / 3)).astype(np.float32)
    with av.open(str(path), "w") as container:
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for start in (0, 16000):
            sound = av.AudioFrame.from_ndarray((tone * 32767).astype(np.int16)[None], format="s16", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = 16000, start, Fraction(1, 16000)
            container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    got = load_audio(path)
    assert len(got) == 24000 and np.abs(got[8000:16000]).max() == 0 and got[16000:].std() > .3


def test_speed_is_not_lost(tmp_path):
    "One reformatter per file: reading 256x256 decodes over 3000 frames per CPU second; one per frame, some 300."
    path = write_video(tmp_path / "s.mp4", np.zeros((200, 256, 256, 3), np.uint8), preset="ultrafast")
    began = time.process_time()
    read_frames(path)
    assert 200 / (time.process_time() - began) > 500
