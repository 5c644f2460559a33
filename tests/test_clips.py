"The clip store: what prepare refuses, how it resumes, what damage looks like, and batches as functions of the step."
import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from talkingface.core import InputError, MissingWeights, StoreError, rng
from talkingface.data import clips as C
from talkingface.data.audio import save_audio
from talkingface.data.clips import (REFERENCES, ClipStore, ReferenceBatches, SyncBatches, clip_path, prepare, read_tensors,
                                    reference_frames, sync_windows, valid_starts, still_frames)
from talkingface.data.corpora import Record
from talkingface.data.faces import MEAN_FACE
from talkingface.data.video import write_video


def film(folder, name, frames=10, seconds=None, size=(96, 96), missing=0, split='train', sound=True, **options):
    "A tiny clip with a drifting face of which the last `missing` frames are not found."
    draw = rng(0, name); video = Path(folder)/f'{name}.mp4'; height, width = size
    pictures = np.repeat(draw.integers(0, 256, (frames, height//8 + 1, width//8 + 1, 3), np.uint8), 8, 1).repeat(8, 2)[:, :height, :width]
    write_video(video, pictures, **options)
    if sound: save_audio(video.with_suffix('.wav'), (.1*np.sin(np.arange(round(16000*(seconds or frames/25)))/8)).astype(np.float32))
    landmarks = MEAN_FACE*.35 + draw.normal(0, .5, (frames, 1, 2)); landmarks[frames - missing:] = np.nan
    np.savez(video.with_suffix('.npz'), landmarks=landmarks.astype(np.float32))
    return Record(name, split, f'person {name}', video, video.with_suffix('.wav') if sound else None, video.with_suffix('.npz'))


def reason_of(record, out): return next(iter(prepare([record], out, workers=1)['reasons']), '')


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    return [film(folder, f'clip{i}', frames) for i, frames in enumerate((40, 29, 7, 60, 33, 50))]


@pytest.fixture(scope='module')
def store(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp('store')/'store'; prepare(corpus, out, workers=1)
    return ClipStore(out)


# what is stored

def test_arrays_have_the_shapes_of_the_contract(store):
    for index in range(len(store)):
        clip = store[index]; frames = clip.frames
        assert clip.faces.shape == (frames, 3, 96, 96) and clip.mouths.shape == (frames, 96, 96) and clip.landmarks.shape == (frames, 68, 2)
        assert clip.wav.shape == (640*frames,) and clip.mel.shape == (80, 1 + 640*frames//200) and clip.boxes.shape == (frames, 4)
        assert clip.valid.dtype == bool and not clip.faces.flags.writeable
    assert [row['frames'] for row in store.rows] == [40, 29, 7, 60, 33, 50]


def test_phonemes_are_kept_and_must_have_times(tmp_path):
    record = film(tmp_path, 'a'); kept = dict(np.load(record.tracks)); times = np.array([[0, .1], [.1, .25]], np.float32)
    np.savez(record.tracks, **kept, phones=np.array(['tʃ', 'iː']), phone_times=times); prepare([record], tmp_path/'one', workers=1)
    clip = ClipStore(tmp_path/'one')[0]; assert clip.phones == ('tʃ', 'iː'); np.testing.assert_array_equal(clip.phone_times, times)
    np.savez(record.tracks, **kept, phones=np.array(['tʃ', 'iː']), phone_times=times[:1])
    assert 'expected a time for each phone' in reason_of(record, tmp_path/'two')


def test_clips_without_phonemes_have_none(store):
    assert store[0].phones == () and store[0].phone_times.shape == (0, 2)


def test_landmarks_keep_their_order_whatever_their_memory_layout(tmp_path):
    record = film(tmp_path, 'a'); kept = dict(np.load(record.tracks)); prepare([record], tmp_path/'one', workers=1)
    np.savez(record.tracks, landmarks=np.asfortranarray(kept['landmarks'])); prepare([record], tmp_path/'two', workers=1)
    first, second = (ClipStore(tmp_path/name)[0].landmarks for name in ('one', 'two'))
    np.testing.assert_array_equal(first, second); assert first[0, 8, 1] > first[0, 33, 1] > first[0, 27, 1]


def test_pool_and_one_process_write_the_same_bytes(corpus, store, tmp_path):
    prepare(corpus[:3], tmp_path/'store', workers=2); other = ClipStore(tmp_path/'store')
    assert [r['sha256'] for r in other.rows] == [r['sha256'] for r in store.rows[:3]]


def test_splits(corpus, tmp_path):
    records = [Record(**{**r.__dict__, 'split': s}) for r, s in zip(corpus, ('train', 'train', 'test'))]
    prepare(records, tmp_path/'store', workers=1); store = ClipStore(tmp_path/'store')
    assert store.split('train').names == ['clip0', 'clip1'] and len(store.split('train', 'test')) == 3
    with pytest.raises(InputError, match='it has test, train'): store.split('hd')
    with pytest.raises(InputError, match="no clip 'clip2'"): store.split('train').by_name('clip2')


# clips that cannot be used, and clips that can

@pytest.mark.parametrize('options, reason', [
    (dict(frames=4), 'too short: 4 frames'), (dict(missing=6), 'no face in 60% of 10 frames'), (dict(missing=10), 'no face in any of 10 frames'),
    (dict(frames=8, missing=4), 'no 5 frames in a row'), (dict(sound=False), 'no audio stream')])
def test_unusable_clip_has_a_reason(tmp_path, options, reason):
    assert reason in reason_of(film(tmp_path, 'a', **options), tmp_path/'store')
    assert len(ClipStore(tmp_path/'store')) == 0


def damage(path, how):
    if how == 'gone': path.unlink()
    elif how == 'empty': path.write_bytes(b'')
    elif how == 'cut': path.write_bytes(path.read_bytes()[:path.stat().st_size//2])
    else: path.write_bytes(b'these are not pictures' * 50)


@pytest.mark.parametrize('how', ['gone', 'empty', 'cut', 'other'])
@pytest.mark.parametrize('part', ['video', 'audio', 'tracks'])
def test_damaged_source_is_a_reason_and_not_a_crash(tmp_path, how, part):
    bad, good = film(tmp_path, 'bad'), film(tmp_path, 'good'); damage(getattr(bad, part), how)
    summary = prepare([bad, good], tmp_path/'store', workers=1); reasons = list(summary['reasons'])
    if (part, how) == ('audio', 'cut'): assert summary['used'] == 2       # half a wav is a short sound
    else: assert summary['used'] == 1 and len(reasons) == 1 and 'bad' in reasons[0] and str(tmp_path) not in reasons[0]


def test_sound_without_pictures_is_a_reason(tmp_path):
    record = film(tmp_path, 'a'); save_audio(tmp_path/'sound.wav', np.zeros(16000, np.float32))
    assert 'no video stream' in reason_of(Record('a', 'train', 'a', tmp_path/'sound.wav', None, record.tracks), tmp_path/'store')


def test_tracks_of_another_length_are_a_reason(tmp_path):
    record = film(tmp_path, 'a'); np.savez(record.tracks, landmarks=np.tile(MEAN_FACE, (12, 1, 1)))
    assert 'tracks have 12 frames, the video has 10' in reason_of(record, tmp_path/'store')


@pytest.mark.parametrize('seconds, note', [(.4, ''), (.43, ''), (.2, '0.20 s shorter'), (.9, '0.50 s longer')])
def test_sound_is_fitted_to_the_video(tmp_path, seconds, note):
    prepare([film(tmp_path, 'a', seconds=seconds)], tmp_path/'store', workers=1); store = ClipStore(tmp_path/'store')
    assert len(store[0].wav) == 6400 and note in store.rows[0]['note'] and bool(note) == bool(store.rows[0]['note'])
    if seconds < .4: assert np.abs(store[0].wav[3200:]).max() == 0 < np.abs(store[0].wav[:3200]).max()


def test_odd_sizes_and_sound_inside_the_video(tmp_path):
    wav = (.1*np.sin(np.arange(6400)/8)).astype(np.float32)
    record = film(tmp_path, 'a', size=(97, 111), sound=False, wav=wav); assert reason_of(record, tmp_path/'store') == ''


def test_frames_of_a_gap_are_marked_and_skipped(tmp_path):
    record = film(tmp_path, 'a', frames=20); landmarks = np.load(record.tracks)['landmarks']; landmarks[9] = np.nan
    np.savez(record.tracks, landmarks=landmarks); prepare([record], tmp_path/'store', workers=1); clip = ClipStore(tmp_path/'store')[0]
    assert (~clip.valid).nonzero()[0].tolist() == [9] and np.isfinite(clip.landmarks).all()
    assert valid_starts(clip).tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15]


def test_missing_weights_stop_prepare_instead_of_refusing_every_clip(tmp_path, monkeypatch):
    from talkingface.data.faces import FaceAlignmentTracker
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(MissingWeights, match='s3fd'): prepare([film(tmp_path, 'a')], tmp_path/'store', FaceAlignmentTracker(), workers=1)


def test_arguments_of_prepare(corpus, tmp_path):
    with pytest.raises(InputError, match='has no clips'): prepare([], tmp_path/'store')
    with pytest.raises(InputError, match='needs stored tracks'): prepare(corpus, tmp_path/'store', object(), boxes='boxes_jittered')
    with pytest.raises(InputError, match="'clip0' occurs more than once"): prepare([corpus[0]]*2, tmp_path/'store')


# resuming

def times(root): return {p.name: p.stat().st_mtime_ns for p in (Path(root)/'clips').rglob('*.safetensors')}


def test_second_run_touches_nothing(corpus, tmp_path):
    prepare(corpus[:2], tmp_path/'store', workers=1); before = times(tmp_path/'store')
    files = {p: p.stat().st_mtime_ns for p in (tmp_path/'store').iterdir()}
    assert prepare(corpus[:2], tmp_path/'store', workers=1)['done'] == 0 and times(tmp_path/'store') == before
    assert all(p.stat().st_mtime_ns == t for p, t in files.items() if p.name != 'prepare.jsonl' and p.is_file())


def test_changed_source_or_setting_prepares_again(corpus, tmp_path):
    record = film(tmp_path, 'a'); out = tmp_path/'store'; prepare([record, corpus[0]], out, workers=1)
    os.utime(record.video); assert prepare([record, corpus[0]], out, workers=1)['done'] == 0      # same bytes, another time
    save_audio(record.audio, np.zeros(6400, np.float32)); assert prepare([record, corpus[0]], out, workers=1)['done'] == 1
    assert np.abs(ClipStore(out).by_name('a').wav).max() == 0
    assert prepare([record, corpus[0]], out, size=64, workers=1)['done'] == 2 and ClipStore(out).size == 64


def test_kill_loses_at_most_the_clip_in_flight(corpus, store, tmp_path):
    out = tmp_path/'store'
    code = textwrap.dedent('''
        import pickle, sys
        from talkingface.data import clips
        records, out = pickle.load(sys.stdin.buffer)
        make = clips._made
        def slow(record, **rest):
            import time
            if record.clip == 'clip3': print('reached', flush=True); time.sleep(60)
            return make(record, **rest)
        clips._made = slow
        clips.prepare(records, out, workers=1)
    ''')
    run = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    run.stdin.write(pickle.dumps((corpus, str(out)))); run.stdin.close()
    assert run.stdout.readline() == b'reached\n'; run.send_signal(signal.SIGKILL); run.wait(); run.stdout.close()
    with pytest.raises(StoreError, match='not a finished clip store'): ClipStore(out)
    with open(out/'prepare.jsonl', 'a') as journal: journal.write('{"settings": "cut off')
    before = times(out); assert len(before) == 3
    clip_path(out, 'clip0').with_name('.clip3.0badf00d.part.safetensors').write_bytes(b'half')
    assert prepare(corpus, out, workers=1)['done'] == 3 and {k: times(out)[k] for k in before} == before
    assert ClipStore(out).info['content'] == store.info['content'] and not list(out.rglob('*.part*'))


def test_full_disk_says_so_and_the_next_run_goes_on(corpus, tmp_path, monkeypatch):
    out, write, count = tmp_path/'store', Path.write_bytes, []
    def full(self, data):
        if self.suffix == '.safetensors':
            count.append(1)
            if len(count) > 2: write(self, data[:1000]); raise OSError(errno.ENOSPC, 'No space left on device')
        return write(self, data)
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(StoreError, match='after 2 of 6 clips.*No space left.*run it again'): prepare(corpus, out, workers=1)
    monkeypatch.undo(); assert not list(out.rglob('*.part*'))
    assert prepare(corpus, out, workers=1)['done'] == 4 and len(ClipStore(out)) == 6


# damage

@pytest.mark.parametrize('how', ['gone', 'empty', 'cut', 'other', 'header'])
def test_damaged_clip_is_named_and_mended(corpus, tmp_path, how):
    out = tmp_path/'store'; prepare(corpus[:2], out, workers=1); path = clip_path(out, 'clip1')
    if how == 'header': path.write_bytes(path.read_bytes()[:8] + b'{"faces": {"dtype"' + path.read_bytes()[26:])
    else: damage(path, how)
    with pytest.raises(StoreError, match='clip1.*rerun prepare'): ClipStore(out).by_name('clip1')
    assert ClipStore(out).by_name('clip0').frames == 40
    assert prepare(corpus[:2], out, workers=1)['done'] == 1 and ClipStore(out).by_name('clip1').frames == 29


def test_a_flipped_byte_is_found_by_verify_and_mended(corpus, tmp_path):
    out = tmp_path/'store'; prepare(corpus[:2], out, workers=1); path = clip_path(out, 'clip1')
    blob = bytearray(path.read_bytes()); blob[-100] ^= 1; path.write_bytes(blob)
    with pytest.raises(StoreError, match='clip1.*rerun prepare'): ClipStore(out).verify()
    assert prepare(corpus[:2], out, workers=1)['done'] == 1; ClipStore(out).verify()


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(StoreError, match='run prepare'): ClipStore(tmp_path/'nothing')
    with pytest.raises(StoreError, match='is missing'): read_tensors(tmp_path/'x.safetensors')


# batches

def equal(one, other): return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize('make', [lambda s: SyncBatches(s, batch=16, per_clip=4, seed=3), lambda s: ReferenceBatches(s, batch=4, seed=3)])
def test_batches_depend_on_the_step_alone(store, make):
    first = make(store); forward = [first[step] for step in range(4)]
    later = make(ClipStore(store.root)); assert all(equal(forward[step], later[step]) for step in (3, 1, 0, 2))
    loader = torch.utils.data.DataLoader(pickle.loads(pickle.dumps(first)), sampler=range(4), batch_size=None, num_workers=2)
    assert all(equal(a, b) for a, b in zip(forward, loader)); assert not equal(forward[0], forward[1])
    other = make(store); other.seed = 4; assert not equal(other[0], forward[0])


def test_sync_windows_hold_what_the_clip_holds(store):
    batches = SyncBatches(store, batch=16, per_clip=4); batch = batches[5]
    for b in range(16):
        clip, start = store[int(batch['clip'][b])], int(batch['start'][b]); column = int(80*start/25)
        np.testing.assert_array_equal(batch['faces'][b], clip.faces[start:start + 5])
        np.testing.assert_array_equal(batch['mel'][b], clip.mel[:, column:column + 16])
        other, far = store[int(batch['clip_negative'][b])], int(80*batch['start_negative'][b]/25)
        np.testing.assert_array_equal(batch['mel_negative'][b], other.mel[:, far:far + 16])


def test_negatives_keep_their_distance(store):
    batches = SyncBatches(store, batch=16, per_clip=4)
    for step in range(20):
        batch = batches[step]; same = batch['clip'] == batch['clip_negative']
        assert ((batch['start'] - batch['start_negative']).abs()[same] >= 5).all()
        assert (same == (batch['clip'] != store.names.index('clip2'))).all()          # 7 frames: nothing is far enough
        for clip in batch['clip'].unique(): assert (batch['start'][batch['clip'] == clip].sort().values.diff() >= 5).all()


def test_share_of_negatives_from_other_clips(store):
    def share(given):
        batches = SyncBatches(store.first(2), 8, other_clip=given)
        return np.mean([(batches[step]['clip'] != batches[step]['clip_negative']).float().mean() for step in range(40)])
    assert share(0.) == 0 and share(1.) == 1 and abs(share(.3) - .3) < .1


def test_every_clip_comes_once_an_epoch(store):
    batches = ReferenceBatches(store, batch=3)
    for epoch in range(3):
        assert sorted(torch.cat([batches[2*epoch + k]['clip'] for k in range(2)]).tolist()) == list(range(6))


def test_a_store_too_small_for_the_batch_says_so(store):
    with pytest.raises(InputError, match='lower batch or raise per_clip'): SyncBatches(store, batch=64)
    with pytest.raises(InputError, match='at least two clips'):
        only = store.where(lambda row: row['clip'] == 'clip2'); SyncBatches(only, batch=1, per_clip=1)[0]


@pytest.mark.parametrize('reference', REFERENCES)
def test_references(store, reference):
    batches = ReferenceBatches(store, batch=6, reference=reference)
    for step in range(8):
        batch = batches[step]
        for b in range(6):
            clip, start, frames = store[int(batch['clip'][b])], int(batch['start'][b]), batch['reference_frame'][b].numpy()
            np.testing.assert_array_equal(batch['reference'][b], clip.faces[frames])
            if clip.frames > 25 and reference != 'per_frame': assert (abs(frames[:, None] - np.arange(start, start + 5)) >= 5).all()
            if clip.frames > 25 and reference == 'per_frame': assert (abs(frames - np.arange(start, start + 5)) >= 5).all()
            if reference in ('fixed', 'closed', 'first'):       # that of the whole clip, but for windows near it
                whole = reference_frames(clip, reference, 0, clip.frames, None, batches.seed)[0]
                if not start - 5 < whole < start + 9: assert frames[0] == whole
            if reference in ('random', 'fixed', 'closed', 'first'): assert len(set(frames)) == 1
            if reference == 'closed':
                gap = C.aperture(clip.landmarks); at = np.arange(clip.frames); far = (at <= start - 5) | (at >= start + 9)
                assert gap[frames[0]] == gap[far if far.any() else (at < start) | (at > start + 4)].min()


def test_stills_change_nothing_else(store):
    "A stream of their own: batches without stills are what they were, and with them the rest is bit for bit the same."
    for reference in REFERENCES:
        plain, shown = (ReferenceBatches(store, batch=4, reference=reference, seed=3, stills=n) for n in (0, 5))
        for step in range(4):
            one, other = plain[step], shown[step]
            assert other.keys() - one.keys() == {'stills', 'still_landmarks', 'still_frame'} and all(torch.equal(one[k], other[k]) for k in one)


def test_stills_of_a_window(store):
    batches, seen = ReferenceBatches(store, batch=6, stills=5), set()
    for step in range(8):
        batch = batches[step]; assert equal(batch, ReferenceBatches(store, batch=6, stills=5)[step])
        assert batch['stills'].dtype == torch.uint8 and batch['still_landmarks'].dtype == torch.float32
        for b in range(6):
            clip, start, at = store[int(batch['clip'][b])], int(batch['start'][b]), batch['still_frame'][b].numpy()
            np.testing.assert_array_equal(batch['stills'][b], clip.faces[at]); np.testing.assert_array_equal(batch['still_landmarks'][b], clip.landmarks[at])
            assert clip.valid[at].all() and (np.diff(C.aperture(clip.landmarks[at])) >= 0).all()
            frames = np.arange(clip.frames); far = clip.valid & ((frames <= start - 5) | (frames >= start + 9))
            if far.any(): assert far[at].all() and len(set(at.tolist())) == min(5, far.sum())
            seen |= {(int(batch['clip'][b]), tuple(at.tolist()))}
    assert len(seen) > 24                                        # not one choice for each clip


def test_stills_of_a_whole_clip_are_spread_over_its_openings(store):
    for clip in store:
        opened = C.aperture(clip.landmarks); known = np.flatnonzero(clip.valid); at = still_frames(clip, 5)
        assert np.array_equal(at, still_frames(ClipStore(store.root).by_name(clip.name), 5)) and clip.valid[at].all()
        assert len(set(at.tolist())) == min(5, len(known)) and (np.diff(opened[at]) >= 0).all()
        assert opened[at[0]] == opened[known].min() and opened[at[-1]] == opened[known].max()
        assert np.array_equal(opened[at], np.quantile(opened[known], np.linspace(0, 1, 5), method='lower'))
    points = np.zeros((9, 68, 2)); points[:, 66, 1] = [3, 1, 2, 1, 1, 9, 1, 1, 3]; clip = SimpleNamespace(landmarks=points, valid=np.arange(9) != 1)
    assert still_frames(clip, 3).tolist() == [3, 7, 5] and still_frames(clip, 1).tolist() == [3] and len(set(still_frames(clip, 8).tolist())) == 8
    assert still_frames(clip, 12).tolist() == sorted(still_frames(clip, 12).tolist(), key=still_frames(clip, 8).tolist().index)
    with pytest.raises(InputError, match='no frame with a face'): still_frames(SimpleNamespace(landmarks=points, valid=np.zeros(9, bool)), 5)


def test_reference_of_a_whole_clip(store):
    clip = store.by_name('clip1')
    with pytest.raises(InputError, match='whole clips'): reference_frames(clip, 'window', 0, clip.frames, rng(0))   # it would show the target itself
    for reference in set(REFERENCES) - {'window'}:
        frames = reference_frames(clip, reference, 0, clip.frames, rng(0)); assert len(frames) == 29 and 0 <= frames.min() and frames.max() < 29


def test_windows_of_a_word(store):
    windows = sync_windows(store.by_name('clip1'))
    assert windows['faces'].shape == (25, 5, 3, 96, 96) and windows['mel'].shape == (25, 80, 16) and windows['start'].tolist() == list(range(25))


def test_few_files_are_open(store, monkeypatch):
    monkeypatch.setattr(C, '_KEPT', 2); few = ClipStore(store.root)
    for index in range(6): few[index]
    assert len(few._open) == 2


def test_reading_needs_numpy_and_torch_only(store):
    code = textwrap.dedent(f'''
        import sys
        for name in ('cv2', 'av', 'pandas', 'librosa', 'skimage', 'soxr', 'scipy', 'matplotlib', 'fastcore', 'safetensors', 'tqdm',
                     'lightning', 'yaml', 'talkingface.data.faces'): sys.modules[name] = None
        from talkingface.data.clips import ClipStore, SyncBatches, ReferenceBatches
        store = ClipStore({str(store.root)!r}); SyncBatches(store, 8, 4)[0]; ReferenceBatches(store, 4, reference='closed')[0]; print(len(store))
    ''')
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == '6', run.stderr


def test_a_batch_is_made_in_milliseconds(store):
    batches = SyncBatches(store, batch=16, per_clip=4); batches[0]; start = time.process_time()
    for step in range(1, 21): batches[step]
    assert (time.process_time() - start)/20 < .05      # a loose bound: about 1 ms on one core
