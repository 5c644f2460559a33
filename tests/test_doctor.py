"""The doctor finds what is wrong with a corpus: on clips of the rendered corpus, spoilt on purpose."""
import json
import os
import shutil

import numpy as np
import pytest
import torch

from talkingface.cli import main
from talkingface.core import InputError
from talkingface.data.audio import load_audio, save_audio
from talkingface.data.clips import ClipStore, prepare
from talkingface.data.corpora import open_corpus
from talkingface.data.video import read_frames, write_video
from talkingface.doctor import Limits, LoudnessExpert, clip_segments, doctor, gather_offsets, judge_offsets, look_at_video, usual_expert
from talkingface.experts.base import unit_length

CLIPS = 16


@pytest.fixture(scope='module')
def clips(root):
    "Videos of the test split of the rendered corpus; those without speech would say nothing of sync."
    corpus = root/'data'/'corpus'
    if not corpus.is_dir(): pytest.skip('no data/corpus: dvc pull')
    return [r for r in open_corpus(corpus) if r.split == 'test' and r.text][:CLIPS]


def copied(clips, folder, sound=lambda wav: wav, split='train'):
    "A folder of videos with tracks and sound beside them."
    for record in clips:
        stem = folder/split/record.identity/record.clip; stem.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(record.video, stem.with_suffix('.mp4')); os.symlink(record.tracks, stem.with_suffix('.npz'))
        save_audio(stem.with_suffix('.flac'), sound(load_audio(record.audio)))
    return folder


def late(frames):
    "Sound that comes `frames` frames later than it should (or earlier), of the same length."
    def shift(wav):
        count = 640*abs(frames); silence = np.zeros(count, np.float32)
        return np.concatenate([silence, wav[:-count]] if frames > 0 else [wav[count:], silence])
    return shift


@pytest.fixture(scope='module')
def shifted(clips, tmp_path_factory): return copied(clips, tmp_path_factory.mktemp('late')/'corpus', late(3))


def test_a_corpus_in_sync_is_fit(clips, tmp_path):
    report = doctor(copied(clips, tmp_path/'corpus'), 'loudness')
    assert report.fit and report.offsets.median == 0 and report.offsets.support > .5, report.text


def test_sound_shifted_by_three_frames_is_found(shifted):
    "The point of the doctor: three frames, late, and how to mend it."
    report = doctor(shifted, 'loudness')
    assert not report.fit and report.offsets.median == 3
    assert 'the audio is 3 frames (0.12 s) late' in report.text and '-itsoffset -0.12' in report.text and 'NOT FIT' in report.text


def test_early_sound_has_the_other_sign(clips, tmp_path):
    report = doctor(copied(clips, tmp_path/'corpus', late(-4)), 'loudness')
    assert report.offsets.median == -4 and '4 frames (0.16 s) early' in report.text and '-itsoffset 0.16' in report.text


def test_a_store_of_the_shifted_corpus(shifted, tmp_path):
    "The same from prepared clips, with status 1 and the cause in the terminal."
    prepare(open_corpus(shifted), tmp_path/'store', workers=1)
    report = doctor(ClipStore(tmp_path/'store'), LoudnessExpert())
    assert report.kind == 'store' and report.offsets.median == 3 and not report.fit


def test_the_command(shifted, tmp_path, capsys):
    assert main(['doctor', str(shifted), '--expert', 'loudness', '--json', str(tmp_path/'report.json')]) == 1
    told = capsys.readouterr().out
    assert '3 frames (0.12 s) late' in told and '-itsoffset' in told
    saved = json.loads((tmp_path/'report.json').read_text())
    assert saved['fit'] is False and saved['offsets']['median'] == 3 and len(saved['clips']) == CLIPS
    assert main(['doctor', str(shifted), '--limit', '3', '--expert', 'none']) == 0   # nothing else is wrong with it
    told = capsys.readouterr().out
    assert '3 looked at' in told and 'pass --expert FOLDER' in told and 'sync was not checked' in told


def test_the_command_looks_at_sync_without_being_told(shifted, tmp_path, monkeypatch):
    "A trained expert under runs/, or the weights of syncnet_v2, are used if nobody says anything."
    asked = []; monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path/'weights')); monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('talkingface.doctor.open_expert', lambda expert, device='cpu': (asked.append(expert), (LoudnessExpert(), 'x'))[1])
    assert usual_expert() is None
    for name, age in (('old', 2), ('new', 1)):
        meta = tmp_path/'runs'/name/'experts'/'syncnet'/'meta.json'; meta.parent.mkdir(parents=True)
        meta.write_text('{}'); os.utime(meta, (1e9 - age, 1e9 - age))
    assert main(['doctor', str(shifted)]) == 1 and asked == ['runs/new/experts/syncnet']
    (tmp_path/'weights').mkdir(); (tmp_path/'weights'/'syncnet_v2.model').touch()
    assert usual_expert() == 'syncnet_v2' and main(['doctor', str(shifted), '--expert', 'none']) == 0 and len(asked) == 1


def test_the_command_says_what_it_cannot_open(tmp_path, capsys):
    assert main(['doctor', str(tmp_path/'absent')]) == 1
    assert 'no such folder' in capsys.readouterr().err
    write_video(tmp_path/'a.mp4', np.zeros((10, 64, 64, 3), np.uint8))
    assert main(['doctor', str(tmp_path), '--expert', str(tmp_path/'none')]) == 1
    assert 'meta.json' in capsys.readouterr().err


def test_the_sound_of_other_clips_is_scattered(clips, tmp_path):
    sounds = [load_audio(r.audio) for r in clips]; order = iter([*range(5, len(clips)), *range(5)])
    report = doctor(copied(clips, tmp_path/'corpus', lambda wav: sounds[next(order)]), 'loudness')
    assert not report.fit and report.offsets.support < .4 and 'scattered' in report.text


def test_each_clip_with_its_own_offset():
    "Clips in sync with themselves only: the report tells this from noise."
    draw = torch.Generator().manual_seed(0); segments = []
    for i in range(12):
        lips = unit_length(torch.randn(100, 32, generator=draw))
        segments += clip_segments(lips, lips.roll(2*i - 11, 0), np.ones(100, bool), f'clip_{i}')
    found = gather_offsets(segments); finding, = judge_offsets(found, Limits())
    assert found.by_clip == {f'clip_{i}': 2*i - 11 for i in range(12)} and 'different amounts' in finding.what


def test_one_clip_among_good_ones_is_named():
    draw = torch.Generator().manual_seed(0); segments = []
    for i in range(12):
        lips = unit_length(torch.randn(100, 32, generator=draw))
        segments += clip_segments(lips, lips.roll(6*(i == 4), 0), np.ones(100, bool), f'clip_{i}')
    finding, = judge_offsets(gather_offsets(segments), Limits())
    assert finding.level == 'warning' and 'clip_4' in finding.what


def test_mixed_and_wrong_frame_rates(clips, tmp_path):
    folder = copied(clips[:4], tmp_path/'corpus')
    for video in sorted(folder.rglob('*.mp4'))[:2]:
        frames = read_frames(video); video.unlink()
        write_video(video, frames[np.arange(int(len(frames)*1.2))*25//30], fps=30)
    report = doctor(folder)
    assert not report.fit and 'mixed frame rates' in report.text and '30 in 2' in report.text
    assert doctor(folder, limits=Limits(any_rate=True)).fit
    for video in folder.rglob('*.mp4'):                                          # filmed at 25, stored as if at 30
        frames = read_frames(video, None); video.unlink(); write_video(video, frames[:100], fps=30)
    assert 'wrong frame rate' in (told := doctor(folder).text) and 'another speed' in told


def test_videos_without_landmarks(clips, tmp_path, monkeypatch):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    folder = copied(clips[:3], tmp_path/'corpus')
    for tracks in folder.rglob('*.npz'): tracks.unlink()
    report = doctor(folder)
    assert not report.fit and 'talkingface weights' in report.text
    assert '3 of 3 clips cannot be used: no landmarks (3)' in report.text


def test_videos_without_a_face(clips, tmp_path):
    folder = copied(clips[:3], tmp_path/'corpus')
    for tracks in folder.rglob('*.npz'):
        tracks.unlink(); np.savez(tracks, landmarks=np.full((100, 68, 2), np.nan, np.float32))
    report = doctor(folder)
    assert not report.fit and 'no face (3)' in report.text


def test_silence_and_missing_sound(clips, tmp_path):
    assert 'is silent' in (report := doctor(copied(clips[:3], tmp_path/'silent', np.zeros_like), 'loudness')).text and not report.fit
    assert 'no segment of speech' in report.text
    folder = copied(clips[:3], tmp_path/'mute')
    for sound in folder.rglob('*.flac'): sound.unlink()
    assert 'no audio' in (report := doctor(folder)).text and not report.fit


def test_people_and_files_in_two_splits(clips, tmp_path):
    folder = copied(clips[:4], tmp_path/'corpus'); shutil.copytree(folder/'train', folder/'test')
    report = doctor(folder)
    assert not report.fit and '4 videos lie in two splits' in report.text and 'occur in more than one split' in report.text


def test_reasons_are_those_of_prepare(clips, tmp_path):
    "A damaged video is a clip with a reason, not the end of the report."
    folder = copied(clips[:4], tmp_path/'corpus'); video = next(folder.rglob('*.mp4')); data = video.read_bytes()
    video.unlink(); video.write_bytes(data[:len(data)//2])
    report = doctor(folder)
    assert report.fit and '1 of 4 clips cannot be used' in report.text and sum(bool(r['reason']) for r in report.clips) == 1


def test_a_clip_is_seen_as_training_would_see_it(clips):
    facts, clip = look_at_video(clips[0])
    assert facts['rate'] == 25 and facts['frames'] == len(clip.faces) == len(clip.wav)//640 and 80 < facts['face'] < 140


def test_landmarks_are_all_that_the_loudness_expert_sees():
    with pytest.raises(InputError, match='landmarks'): LoudnessExpert().embed_video(torch.zeros(1, 20, 3, 96, 96))
