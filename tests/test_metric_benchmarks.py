"""What metrics cost: that the ways that are compared measure the same, and that the measuring itself can be trusted."""
import csv
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from talkingface.core import InputError
from talkingface.data.audio import load_audio
from talkingface.data.faces import StoredTracks
from talkingface.data.video import read_frames
from talkingface.metric_benchmarks import (COLUMNS, StandInTracker, anonymous_memory, bench_frechet, bench_lse, bench_set, bench_tracks,
                                           corpus_footage, crops_of, cropped, in_turn, naive_lse, peak_memory, profile_scorers,
                                           real_footage, repeated, run_metric_benchmarks, seeded, times_slower)
from talkingface.metrics.report import Scorers
from talkingface.metrics.sync import SyncScorer

TINY = {'name': 'syncnet_v2', 'width': 1/16, 'dim': 16}


@pytest.fixture(scope='module')
def clip(root):
    if not (root/'data'/'corpus').is_dir(): pytest.skip('no data/corpus: dvc pull')
    return corpus_footage(root/'data'/'corpus')


def busy(n): return lambda: sum(range(n))


def test_ratios_of_known_work():
    took = in_turn({'a': busy(400_000), 'b': busy(100_000)}, .3)
    assert len(took['a']) == len(took['b']) >= 2
    assert 2 < times_slower(took, 'a', 'b') < 8


def test_waiting_is_not_work():
    took = in_turn({'sleeps': lambda: time.sleep(.05), 'works': busy(500_000)}, 0., 3)
    assert times_slower(took, 'sleeps', 'works') < 1


def test_one_round_counts_and_the_first_of_several_does_not():
    calls = []
    def slow_at_first():
        calls.append(0); busy(3_000_000 if len(calls) == 1 else 1000)()
    assert len(in_turn({'x': slow_at_first}, 0., 1)['x']) == 1
    calls.clear()
    took = in_turn({'x': slow_at_first}, 0., 3)['x']
    assert len(took) == 2 and took.max() < .02


@pytest.mark.parametrize('batch', [1, 7])
def test_the_usual_script_gives_our_lse(clip, tmp_path, batch):
    "Without loss the same to 1e-4, with JPEG up to its loss; whatever the number of windows at a time."
    crops, expert = cropped(clip, 30, 224, tmp_path), seeded(TINY)
    ours = SyncScorer(seeded(TINY), 'tiny')(crops_of(crops.video), load_audio(crops.audio))
    exact = naive_lse(crops.video, crops.audio, expert, tmp_path/'png', '.png', batch)
    lossy = naive_lse(crops.video, crops.audio, expert, tmp_path/'jpg', '.jpg', batch)
    assert abs(exact.distance - ours.distance) < 1e-4 and abs(exact.confidence - ours.confidence) < 1e-4
    assert exact.offset == ours.offset
    assert 0 < abs(lossy.distance - ours.distance) < .1*ours.distance
    assert len(list((tmp_path/'jpg').iterdir())) == 30


def test_seeded_networks_are_the_same_and_leave_the_generator_alone():
    torch.manual_seed(5); expected = torch.rand(3); torch.manual_seed(5)
    a, b = seeded(TINY).state_dict(), seeded(TINY).state_dict()
    assert torch.equal(torch.rand(3), expected) and all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(v, a[k]) for k, v in seeded(TINY, 1).state_dict().items())


def test_a_repeated_clip_repeats_pictures_landmarks_and_sound(clip, tmp_path):
    long = repeated(clip, 220, tmp_path); pictures, track = read_frames(long.video), StoredTracks().track(long.tracks)
    n = len(read_frames(clip.video)); sound = load_audio(long.audio)
    assert len(pictures) == len(track) == 3*n and len(sound) == 640*3*n
    for x, step in ((pictures, n), (track.landmarks, n), (sound, 640*n)): np.testing.assert_array_equal(x[:step], x[2*step:])


def test_a_folder_without_a_whole_real_clip_is_refused(tmp_path):
    (tmp_path/'clips').mkdir(); (tmp_path/'clips'/'a.mp4').write_bytes(b'x')
    with pytest.raises(InputError, match='expected clips/NAME.mp4 with landmarks/NAME.npz'): real_footage(tmp_path)


def test_speed_of_lse_has_all_its_figures(clip, tmp_path):
    found = bench_lse(clip, tmp_path, 0., 20, TINY, least=1)
    assert found['png'] < 1e-3 and all(np.isfinite(v) and v >= 0 for v in found.values())
    assert found['naive'] > .2 and found['memory'] > .5


def test_the_whole_set_at_once_gives_the_same_values(clip, tmp_path):
    scorers = Scorers(syncs={'tiny': SyncScorer(seeded({'name': 'light_syncnet', 'width': 8, 'dim': 8}), 'tiny')})
    found = bench_set(clip, tmp_path, scorers, 0., 25, ['psnr', 'flicker', 'lse_d', 'lse_c', 'offset'], least=1)
    assert found['apart'] == 0 and found['metrics'] == 5 and found['singly'] > 1.5
    assert sum(found['shares'].values()) == pytest.approx(1) and 'reading' in found['shares']


def test_both_frechet_distances_agree():
    found = bench_frechet(96, 300, 0., least=1)
    assert found['apart'] < 1e-8 and found['ratio'] > 0


def test_a_stand_in_detector_looks_at_every_nth_frame(clip, tmp_path):
    seen = dict(detector=[], landmarks=[])
    networks = tuple((lambda x, k=k: seen[k].append(tuple(x.shape))) for k in seen)
    track = StandInTracker(5, 80, networks).track(clip.video); frames = len(read_frames(clip.video))
    assert len(track) == frames == len(seen['landmarks']) and len(seen['detector']) == -(-frames//5)
    assert max(seen['detector'][0][2:]) == 80 and seen['landmarks'][0] == (1, 3, 256, 256)


def test_cached_tracks_are_fastest(clip, tmp_path, monkeypatch):
    work = lambda x: busy(2_000_000)()
    monkeypatch.setattr('talkingface.metric_benchmarks.trackers', lambda: (
        {'every frame': StandInTracker(1, networks=(work, None)), 'every 5th frame': StandInTracker(5, networks=(work, None))}, 'work'))
    found, how = bench_tracks(clip, tmp_path, 0., 12, TINY, 1)
    assert how == 'work' and found['every frame'] > found['every 5th frame'] > 1


def hold(mib):
    block = np.ones(mib*2**17); time.sleep(.4); assert block[0] == 1


def fail(): sys.exit(3)


@pytest.mark.skipif(not os.path.isfile('/proc/self/status'), reason='memory is read from /proc')
def test_memory_of_a_process_and_of_its_children():
    assert peak_memory(hold, 700) > 700
    child = subprocess.Popen([sys.executable, '-c', 'x = bytearray(b"a")*200_000_000; input()'], stdin=subprocess.PIPE)
    try:
        before, deadline = 0, time.time() + 10
        while before < 190_000 and time.time() < deadline: before = anonymous_memory(child.pid); time.sleep(.05)
        assert 190_000 < before < 300_000 and anonymous_memory(os.getpid()) > before
    finally: child.communicate(b'\n')
    with pytest.raises(InputError, match='status 3'): peak_memory(fail)


def test_networks_that_are_not_trained_stand_in_by_seed(root, tmp_path):
    (tmp_path/'params.yaml').write_text((root/'params.yaml').read_text())
    scorers, missing = profile_scorers(tmp_path, 'smoke')
    assert missing == ['judge', 'landmarker', 'avhubert', 'features']
    assert all([scorers.syncs, scorers.lips, scorers.speech, scorers.lpips, scorers.fid, scorers.features, scorers.identity])


def test_a_small_run_writes_the_table(root, clip, tmp_path, monkeypatch):
    monkeypatch.delenv('TALKINGFACE_REAL_CLIPS', raising=False); threads = torch.get_num_threads()
    table = run_metric_benchmarks(root, 'smoke', 0., full=False, out=tmp_path/'bench.csv')
    with open(tmp_path/'bench.csv', newline='') as file: lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS and len(lines) == len(table) >= 10 and torch.get_num_threads() == threads
    assert np.isfinite(table['value']).all() and all('1 thread used' in x['machine'] for x in lines)
    assert any('bound' in x['what'] for x in lines) and any('one after the other' in x['what'] for x in lines)
