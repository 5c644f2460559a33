"""Dubbing end to end with an untrained generator: every frame and the duration kept, frames without a face, audio of any length."""
import ast

import av
import numpy as np
import pytest
import torch

from talkingface.cli import main
from talkingface.core import InputError, read_json
from talkingface.data.audio import load_audio, mel_spectrogram, save_audio
from talkingface.data.clips import Clip
from talkingface.data.faces import MEAN_FACE, StoredTracks, Track
from talkingface.data.video import probe, read_frames, write_video
from talkingface.dubbing import METHODS, Voice, dub, random_frame, reencoded, reference_track, restore_row, revoice, revoice_row, stored_faces
from talkingface.data.faces import crop_faces, to_crop
from talkingface.generators.base import GENERATORS, Generator
from talkingface.generators.g4g import G4G
from talkingface.generators.light import LightGenerator
from talkingface.generators.lipsync import LipSync
from talkingface.generators.references import Silencer
from talkingface.weights import save_model

torch.set_num_threads(1)


class Stills(Generator):
    "Draws below the pose the first of its stills, the most closed."
    region, needs, stills = (0, .5, 1, 1), ('masked', 'mel', 'stills', 'still_landmarks'), 5
    def __init__(self, size: int = 96): super().__init__('stills', size=size); self.gain = torch.nn.Parameter(torch.ones(()))
    def draw(self, batch):
        self.seen = batch.still_landmarks
        lower = (torch.arange(self.size) >= self.size//2).float().view(-1, 1)
        return (batch.masked + lower*batch.stills[:, :1]*self.gain).clamp(0, 1)


FRAMES, SIZE = 30, 80


@pytest.fixture(scope='module')
def generator():
    torch.manual_seed(0)
    return LightGenerator(width=8).eval()


class Fixed:
    "A tracker with one box; `missing` frames have no face."
    def __init__(self, frames=FRAMES, missing=()):
        self.landmarks = np.random.default_rng(0).uniform(20, 60, (frames, 68, 2)).astype(np.float32)
        self.boxes = np.tile(np.float32([12.5, 8, 66, 71.5]), (frames, 1))
        self.valid = ~np.isin(np.arange(frames), missing)
        self.landmarks[~self.valid], self.boxes[~self.valid] = np.nan, np.nan
    def track(self, video): return Track(self.landmarks, self.boxes, self.valid)


def picture(frames=FRAMES, height=SIZE, width=SIZE):
    "Smooth moving colours, which survive H.264."
    y, x, t = np.meshgrid(np.arange(height), np.arange(width), np.arange(frames), indexing='ij')
    wave = np.stack([np.sin(x/17 + t/9), np.sin(y/13), np.cos((x + y)/29 - t/7)], -1)
    return (127 + 90*wave).astype(np.uint8).transpose(2, 0, 1, 3)


@pytest.fixture(scope='module')
def video(tmp_path_factory): return write_video(tmp_path_factory.mktemp('video')/'face.mp4', picture())


def speech(path, seconds, rate=16_000):
    save_audio(path, np.random.default_rng(1).normal(0, .1, int(seconds*rate)).astype(np.float32))
    return path


def a_clip(frames=FRAMES, missing=()):
    track, draw = Fixed(frames, missing), np.random.default_rng(2)
    wav = draw.normal(0, .1, 640*frames).astype(np.float32)
    return Clip(name='c', split='test', identity='i', text='', faces=draw.integers(0, 256, (frames, 3, 96, 96), dtype=np.uint8),
                mouths=np.zeros((frames, 96, 96), np.uint8), landmarks=track.landmarks, valid=track.valid, boxes=track.boxes,
                mel=mel_spectrogram(wav), wav=wav)


# ---- whole videos -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('seconds,change', [(1.2, 'none'), (.5, 'padded with silence'), (3., 'cut')])
def test_frames_and_duration_are_those_of_the_video(generator, video, tmp_path, seconds, change):
    report = dub(video, speech(tmp_path/'a.wav', seconds), generator, Fixed(), tmp_path/'out.mp4')
    info = probe(tmp_path/'out.mp4')
    assert (info.frames, report['frames'], report['audio_change']) == (FRAMES, FRAMES, change)
    assert info.seconds == pytest.approx(1.2, abs=1e-6) and report['audio_seconds'] == pytest.approx(seconds, abs=.001)
    assert len(load_audio(tmp_path/'out.mp4')) == 640*FRAMES


def test_padding_is_silence_and_starts_where_the_speech_ends(generator, video, tmp_path):
    dub(video, speech(tmp_path/'a.wav', .6), generator, Fixed(), tmp_path/'out.mp4')
    wav = load_audio(tmp_path/'out.mp4')
    assert abs(wav[:9000]).mean() > .02 and abs(wav[12_000:]).max() < .01


def test_frames_without_a_face_pass_through_and_are_counted(generator, video, tmp_path):
    missing = (0, 7, 8, FRAMES - 1)
    report = dub(video, speech(tmp_path/'a.wav', 1.2), generator, Fixed(missing=missing), tmp_path/'out.mp4')
    assert (report['without_face'], report['dubbed']) == (4, FRAMES - 4) and report['reference_frame'] not in missing
    change = abs(read_frames(tmp_path/'out.mp4').astype(int) - read_frames(video)).mean((1, 2, 3))
    others = np.setdiff1d(np.arange(FRAMES), missing)
    assert change[list(missing)].max() < 3 and change[others].mean() > change[list(missing)].max()


def test_nothing_outside_the_box_changes(generator, video, tmp_path):
    dub(video, speech(tmp_path/'a.wav', 1.2), generator, Fixed(), tmp_path/'out.mp4')
    change = abs(read_frames(tmp_path/'out.mp4').astype(int) - read_frames(video))
    assert change[:, :30].mean() < 2 and change[:, 74:].mean() < 2.5 and change[:, 45:65, 20:60].mean() > 3


def test_whole_face_generators_chunks_and_seeds(video, tmp_path):
    torch.manual_seed(1)
    generator, words = LipSync(width=.125).eval(), speech(tmp_path/'a.wav', 1.2)
    first = dub(video, words, generator, Fixed(), tmp_path/'a.mp4', seed=3, chunk=7)
    again = dub(video, words, generator, Fixed(), tmp_path/'b.mp4', seed=3, chunk=30)
    assert first['reference_frame'] == again['reference_frame']
    assert abs(read_frames(tmp_path/'a.mp4').astype(int) - read_frames(tmp_path/'b.mp4')).mean() < 1.5
    assert {dub(video, words, generator, Fixed(), tmp_path/'c.mp4', seed=s)['reference_frame'] for s in range(4)} != {first['reference_frame']}


def test_odd_sizes_and_other_frame_rates(generator, tmp_path):
    video = write_video(tmp_path/'v.mov', picture(60, 81, 79), fps=50)
    report = dub(video, speech(tmp_path/'a.wav', 1.2), generator, Fixed(30), tmp_path/'out.mp4')
    assert report['source_fps'] == pytest.approx(50) and probe(tmp_path/'out.mp4').frames == 30
    assert probe(tmp_path/'out.mp4').seconds == pytest.approx(probe(video).seconds)


@pytest.mark.parametrize('frames', [29, 31])
def test_a_track_of_another_length_is_refused_and_leaves_no_file(generator, video, tmp_path, frames):
    with pytest.raises(InputError, match='track this video again'):
        dub(video, speech(tmp_path/'a.wav', 1.2), generator, Fixed(frames), tmp_path/'out.mp4')
    assert not (tmp_path/'out.mp4').exists()


def test_bad_input_is_named(generator, video, tmp_path):
    words = speech(tmp_path/'a.wav', 1.2)
    with pytest.raises(InputError, match='no such file'): dub(tmp_path/'none.mp4', words, generator, Fixed(), tmp_path/'o.mp4')
    with pytest.raises(InputError, match='no such file'): dub(video, tmp_path/'none.wav', generator, Fixed(), tmp_path/'o.mp4')
    with pytest.raises(InputError, match='no audio'): dub(video, video, generator, Fixed(), tmp_path/'o.mp4')
    with pytest.raises(InputError, match='shows a face'):
        dub(video, words, generator, Fixed(missing=range(FRAMES)), tmp_path/'o.mp4')
    with pytest.raises(InputError, match='one reference frame'):
        dub(video, words, generator, Fixed(), tmp_path/'o.mp4', reference='per_frame')
    assert not (tmp_path/'o.mp4').exists()


def test_a_generator_with_stills_dubs_a_video_from_its_own_frames(video, tmp_path):
    "The stills are those that the crops of this track would give; frames without a face are none of them."
    generator, track = Stills(), Fixed(missing=(0, 7)).track(video); points = to_crop(track.landmarks, track.boxes, 96)
    report = dub(video, speech(tmp_path/'a.wav', 1.2), generator, Fixed(missing=(0, 7)), tmp_path/'out.mp4', chunk=7)
    clip = a_clip(missing=(0, 7)); clip.landmarks = points; wanted = Voice(generator).stills(clip)
    assert report['stills'] == wanted.tolist() and not {0, 7} & set(report['stills']) and len(set(report['stills'])) == 5
    assert np.allclose(generator.seen[0].numpy(), points[wanted], atol=1e-4)
    shown = crop_faces(read_frames(video)[wanted[:1]], track.boxes[wanted[:1]], 96)[0].astype(int)
    out = crop_faces(read_frames(tmp_path/'out.mp4')[12:13], track.boxes[12:13], 96)[0].astype(int)
    assert abs(out - shown)[60:90, 10:86].mean() < 8
    with pytest.raises(InputError, match='leave the silencer out'):
        dub(video, tmp_path/'a.wav', generator, Fixed(), tmp_path/'no.mp4', silencer=Silencer(LightGenerator(width=8)))


# ---- G4G, from the command line ------------------------------------------------------------------------------------------
def lossless(path, frames):
    "A video whose pixels are read back as they were written."
    with av.open(str(path), 'w') as file:
        stream = file.add_stream('ffv1', rate=25); stream.height, stream.width = frames.shape[1:3]; stream.pix_fmt = 'bgr0'
        for image in frames: file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24').reformat(format='bgr0')))
        file.mux(stream.encode(None))
    return path


def a_talking_video(folder, frames, missing=()):
    "A video with its track beside it: a mean face whose mouth opens and closes; `missing` frames have no face."
    path = lossless(folder/'face.mkv', frames); landmarks = np.tile(MEAN_FACE*(frames.shape[1]/256), (len(frames), 1, 1)).astype(np.float32)
    landmarks[:, 65:68, 1] += 6 + 5*np.sin(np.arange(len(frames)))[:, None]; landmarks[list(missing)] = np.nan
    np.savez(folder/'face.npz', landmarks=landmarks)
    return path


@pytest.fixture(scope='module')
def trained_g4g(tmp_path_factory):
    "What a training leaves: config, weights, and the row."
    torch.manual_seed(0); net = G4G(size=96, scale=.25, width=.0625, blocks=1)
    return save_model(tmp_path_factory.mktemp('g4g')/'generators'/'g4g', net, dict(run=dict(row=dict(reference='random', silence=None))))


def generate(folder, video, voice, generator, capsys) -> dict:
    assert main(['generate', '--video', str(video), '--audio', str(voice), '--generator', str(generator), '--out', str(folder/'out.mp4')]) == 0
    return ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize('missing', [(), (0, 5, 6, FRAMES - 1)])
def test_g4g_dubs_a_video_from_the_command_line(trained_g4g, tmp_path, capsys, missing):
    frames = picture(height=128, width=128); video = a_talking_video(tmp_path, frames, missing)
    report = generate(tmp_path, video, speech(tmp_path/'a.wav', 1.5), trained_g4g, capsys)
    assert (report['frames'], report['without_face'], report['audio_change']) == (FRAMES, len(missing), 'cut')
    assert len(set(report['stills'])) == 5 and not set(missing) & set(report['stills']) and report['generator']['name'] == 'g4g'
    info, made = probe(tmp_path/'out.mp4'), read_frames(tmp_path/'out.mp4').astype(int)
    assert info.frames == FRAMES and len(load_audio(tmp_path/'out.mp4')) == 640*FRAMES
    change = abs(made - frames).mean((1, 2, 3)); seen = np.setdiff1d(np.arange(FRAMES), missing)
    assert change[seen].min() > 3 and (not missing or change[list(missing)].max() < 2.5)


def test_the_mouths_of_dubbed_frames_do_not_come_through_g4g(trained_g4g, tmp_path, capsys):
    "Other mouths in all frames that are no stills: the same video to the bit. Another mouth in one still: another video."
    missing, frames = (7, 8), picture(height=128, width=128); video = a_talking_video(tmp_path, frames, missing); voice = speech(tmp_path/'a.wav', 1.2)
    stills = generate(tmp_path, video, voice, trained_g4g, capsys)['stills']; first = read_frames(tmp_path/'out.mp4')
    x0, y0, x1, y1 = np.nanmean(StoredTracks().track(video).boxes, 0)
    mouth = slice(int(y0 + .55*(y1 - y0)), int(y0 + .85*(y1 - y0))), slice(int(x0 + .25*(x1 - x0)), int(x0 + .75*(x1 - x0)))
    def dubbed(changed):
        other = frames.copy(); other[(changed, *mouth)] = 255 - other[(changed, *mouth)]; lossless(video, other)
        assert generate(tmp_path, video, voice, trained_g4g, capsys)['stills'] == stills
        return read_frames(tmp_path/'out.mp4')
    assert np.array_equal(dubbed(np.setdiff1d(np.arange(FRAMES), [*stills, *missing])), first)
    assert abs(dubbed(np.array(stills[2:3])).astype(int) - first).max() > 20


# ---- prepared clips -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('frames', [1, 4, 29, 75])
def test_revoiced_clips_keep_every_frame(generator, frames):
    clip = a_clip(frames)
    out = revoice(generator, clip, clip.mel, batch=32)
    assert out.shape == clip.faces.shape and out.dtype == np.uint8
    assert np.array_equal(out[:, :, :48], clip.faces[:, :, :48])


def test_a_clip_is_re_voiced_with_stills_spread_over_its_openings_unless_frames_are_named():
    clip, voice = a_clip(), Voice(Stills()); closed = int(voice.stills(clip)[0])
    out = revoice(voice, clip, clip.mel, batch=7)
    assert (out[:, :, 48:] == clip.faces[closed, :, 48:]).all() and np.array_equal(out, revoice(Stills(), clip, clip.mel, batch=64))
    named = np.random.default_rng(0).permutation(FRAMES)                       # as the measure of leaking does
    assert np.array_equal(voice.draw(clip, clip.mel, named, 7)[:, :, 48:], clip.faces[named, :, 48:])
    assert (voice.draw(clip, clip.mel, np.full(FRAMES, 3))[:, :, 48:] == clip.faces[3, :, 48:]).all()
    assert Voice(LightGenerator(width=8)).stills(clip) is None


def test_the_record_of_a_row_names_its_stills(tmp_path, monkeypatch):
    monkeypatch.setitem(GENERATORS, 'stills', Stills)
    class Clips(list): rows = [dict(clip='c', split='test')]
    save_model(tmp_path/'row', Stills(), dict(run=dict(row=dict(reference='random')), config=Stills().config))
    clip = a_clip(missing=(3,)); assert revoice_row('row', tmp_path/'row', Clips([clip]), tmp_path/'faces') == ''
    meta = read_json(tmp_path/'faces'/'meta.json'); assert meta['stills'] == {'c': Voice(Stills()).stills(clip).tolist()}
    assert (stored_faces(tmp_path/'faces', ['c'])['c'][:, :, 48:] == clip.faces[meta['stills']['c'][0], :, 48:]).all()
    restore_row('sharp', 'unsharp', tmp_path/'faces', Clips([clip]), tmp_path/'sharp')
    assert read_json(tmp_path/'sharp'/'meta.json')['stills'] == meta['stills']


def test_group_size_does_not_matter_and_the_mode_is_restored(generator):
    clip, training = a_clip(), LightGenerator(width=8).train()
    a, b = (revoice(training, clip, clip.mel, batch=n).astype(int) for n in (4, 64))
    assert abs(a - b).max() <= 1 and training.training


@pytest.mark.parametrize('policy', ['first', 'random', 'fixed', 'closed'])
def test_one_reference_with_a_face_for_the_whole_clip(policy):
    clip = a_clip(missing=(0, 1, 5))
    shown = reference_track(clip, policy, seed=1)
    assert len(shown) == FRAMES and len(set(shown)) == 1 and clip.valid[shown[0]]
    assert np.array_equal(shown, reference_track(clip, policy, seed=1))


def test_closed_takes_the_smallest_opening():
    clip = a_clip(); clip.landmarks[:, 62], clip.landmarks[:, 66] = (40, 40), (40, 50); clip.landmarks[11, 66] = (40, 41)
    assert set(reference_track(clip, 'closed')) == {11}


def test_unknown_reference_policy_is_refused():
    with pytest.raises(InputError, match='expected one of'): reference_track(a_clip(), 'smiling')


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('frames', [1, 29])
def test_baselines_keep_the_shape_and_are_pure(name, frames):
    clip = a_clip(frames)
    out = METHODS[name](clip, 5)
    assert out.shape == clip.faces.shape and out.dtype == np.uint8 and np.array_equal(out, METHODS[name](clip, 5))


def test_random_frames_are_other_frames_of_the_clip():
    clip = a_clip()
    out = random_frame(clip, 0)
    assert all((o != f).any() and (o == clip.faces).all((1, 2, 3)).any() for o, f in zip(out, clip.faces))


def test_reencoding_is_close_but_not_equal():
    clip = a_clip()
    clip.faces = picture(FRAMES, 96, 96).transpose(0, 3, 1, 2)
    error = abs(reencoded(clip).astype(int) - clip.faces)
    assert 0 < error.mean() < 4
