"A corpus has the same bytes whoever builds it, keeps people and voices of its splits apart, and notices damage."
import csv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from talkingface.core import InputError, ParamsError, StoreError
from talkingface.data.audio import load_audio
from talkingface.data.corpora import (COLUMNS, SPLITS, VOICE_POOLS, CorpusSpec, FolderCorpus, Record, RenderedCorpus, Selection,
                                      build_corpus, cast_voice, check_corpus, check_corpus_contract, corpus_differences, corpus_hash,
                                      corpus_spec, first_of_each_split, jitter_boxes, load_tracks, make_person, plan, save_tracks)
from talkingface.data.video import read_frames

NOTHING = {split: dict(identities=0) for split in SPLITS}
TINY = NOTHING | dict(train=dict(identities=2, clips=1, frames=25, kind='word', lead=.1, size=96, silent=0),
                      test=dict(identities=1, clips=2, frames=25, kind='word', lead=.1, size=96, silent=1), preset='veryfast')


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    pytest.importorskip('espeakng_loader')
    return build_corpus(tmp_path_factory.mktemp('built')/'corpus', TINY, seed=3, workers=1)


def test_one_worker_or_two_the_same_bytes(built, tmp_path):
    again = build_corpus(tmp_path/'again', TINY, seed=3, workers=2)
    assert corpus_differences(built.root, again.root) == []
    for row in built.rows:
        for key, path in built.files(row).items(): assert path.read_bytes() == again.files(row)[key].read_bytes()
    assert (built.root/'manifest.csv').read_bytes() == (again.root/'manifest.csv').read_bytes()


def test_a_person_alone_has_the_bytes_of_the_corpus(built, tmp_path):
    task = plan(corpus_spec(TINY), 3)[1]
    (tmp_path/task.split).mkdir()
    rows = make_person(task, tmp_path)
    for row in rows: assert {k: str(v) for k, v in row.items()} == next(r for r in built.rows if r['clip'] == row['clip'])


def test_another_seed_gives_other_people(built, tmp_path):
    small = build_corpus(tmp_path/'other', TINY | dict(test=dict(identities=0)), seed=4, workers=1)
    assert all(row['clip'] in corpus_differences(built.root, small.root) for row in small.rows)


def test_manifest_columns_and_kinds(built):
    with open(built.root/'manifest.csv', newline='') as file: rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 4
    assert [row['kind'] for row in rows] == ['word', 'word', 'word', 'digital']
    for row in rows:
        assert (row['frames'], row['seconds'], row['fps'], row['size']) == ('25', '1.0', '25', '96') and len(row['sha256']) == 64
        assert bool(row['text']) == (row['kind'] == 'word')


def test_files_agree_with_each_other_to_the_frame(built):
    check_corpus_contract(built)
    for record in built:
        frames, wav, tracks = read_frames(record.video), load_audio(record.audio), load_tracks(record.tracks)
        assert frames.shape == (25, 96, 96, 3) and wav.shape == (16_000,)
        shapes = {k: v.shape for k, v in tracks.items() if not k.startswith('phone')}
        assert shapes == dict(landmarks=(25, 68, 2), visible=(25, 68), valid=(25,), boxes=(25, 4), boxes_jittered=(25, 4),
                              visemes=(25, 8), pose=(25, 6), aperture=(25,))
        assert len(tracks['phones']) == len(tracks['phone_times']) and np.isfinite(tracks['landmarks']).all()
        assert (tracks['landmarks'] > -10).all() and (tracks['landmarks'] < 106).all()


def test_silent_clip_is_silent_and_its_mouth_is_shut(built):
    row = next(row for row in built.rows if row['kind'] == 'digital')
    files = built.files(row)
    assert np.abs(load_audio(files['sha256_audio'])).max() == 0
    assert load_tracks(files['sha256_tracks'])['aperture'].max() < .5


def test_people_and_voices_of_the_splits_are_apart():
    tasks = plan(CorpusSpec())
    clips = [name for task in tasks for name, _ in task.clips]
    assert len(set(clips)) == len(clips) >= 160 and len(tasks) >= 96
    voices = {split: {cast_voice(split, i, female, 0).variant for i in range(60) for female in (True, False)} for split in SPLITS}
    for a in SPLITS:
        assert voices[a] <= set(VOICE_POOLS[a])
        for b in SPLITS: assert a == b or not voices[a] & voices[b]


def test_clips_do_not_depend_on_the_size_of_the_corpus():
    small, large = (plan(corpus_spec(dict(train=dict(identities=n, silent=0))), 1) for n in (2, 300))
    assert small[1].clips == large[1].clips == (('train_0001_0', 'sentences'), ('train_0001_1', 'sentences'))


def test_check_finds_missing_changed_and_unlisted_files(built, tmp_path):
    import shutil
    root = tmp_path/'copy'; shutil.copytree(built.root, root)
    assert check_corpus(root) == []
    video = root/'train'/'train_0000_0.mp4'
    video.write_bytes(video.read_bytes()[:-1])
    (root/'test'/'test_0000_0.npz').unlink(); (root/'train'/'stray.flac').write_text('x')
    assert {(p['file'], p['problem']) for p in check_corpus(root)} == {
        ('train/train_0000_0.mp4', 'changed'), ('test/test_0000_0.npz', 'missing'), ('train/stray.flac', 'not listed')}


def test_a_failed_build_leaves_the_old_corpus(built, tmp_path, monkeypatch):
    import talkingface.data.corpora as corpora
    (tmp_path/'corpus').mkdir(); (tmp_path/'corpus'/'old').write_text('old')
    def fail(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(corpora, 'save_audio', fail)
    with pytest.raises(OSError): build_corpus(tmp_path/'corpus', TINY, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ['corpus'] and (tmp_path/'corpus'/'old').read_text() == 'old'


def test_specs_refuse_what_they_do_not_know():
    assert corpus_spec(None) == CorpusSpec()
    with pytest.raises(ParamsError, match='people'): corpus_spec(dict(train=dict(people=3)))
    with pytest.raises(ParamsError, match='expected int'): corpus_spec(dict(hd=dict(size='big')))
    with pytest.raises(InputError, match='hd.kind'): corpus_spec(dict(hd=dict(kind='song')))
    with pytest.raises(InputError, match='empty'): build_corpus('nowhere', NOTHING)


def test_a_missing_or_damaged_corpus_says_how_to_get_one(tmp_path):
    with pytest.raises(StoreError, match='dvc pull.*python -m talkingface corpus build --out '): RenderedCorpus(tmp_path)
    (tmp_path/'manifest.csv').write_text('clip,split\n')
    with pytest.raises(StoreError, match='damaged'): RenderedCorpus(tmp_path)


def test_a_folder_of_odd_files(tmp_path):
    def put(name, text=''):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).write_text(text)
    for name in ('train/ann/a.mp4', 'train/ann/b.AVI', 'val/bob/a.mp4', 'x.mp4', 'x.mov', 'deep/er/still.webm', 'clips/k.mkv',
                 'audio/k.wav', 'landmarks/k.npz', 'notes.md', '.hidden.mp4', 'é ü.mp4', 'archive.zip'): put(name)
    put('x.txt', 'Text:  HELLO THERE\nConf: 3'); put('clips/k.txt', '')
    corpus = FolderCorpus(tmp_path, licence='mine')
    check_corpus_contract(corpus)
    found = {record.clip: record for record in corpus}
    assert set(found) == {'train__ann__a', 'train__ann__b', 'val__bob__a', 'x_mp4', 'x_mov', 'deep__er__still', 'clips__k', 'é ü'}
    assert (found['train__ann__a'].split, found['train__ann__a'].identity) == ('train', 'train__ann')
    assert found['val__bob__a'].split == 'val'
    k = found['clips__k']
    assert (k.audio.name, k.tracks.name, k.identity) == ('k.wav', 'k.npz', 'clips__k')
    assert (k.split, k.text, k.licence) == ('test', '', 'mine')
    assert found['x_mp4'].text == 'HELLO THERE' and found['x_mp4'].audio is None


def crowd(*clips):
    "A corpus of records without files: (split, identity) pairs."
    return Selection('crowd', '', tuple(Record(f'c{i}', *clip, Path(f'c{i}.mp4')) for i, clip in enumerate(clips)))


def test_a_limit_takes_many_people_first_and_keeps_the_order():
    corpus = crowd(('train', 'a'), ('train', 'a'), ('val', 'x'), ('train', 'a'), ('train', 'b'), ('train', 'b'), ('train', 'c'))
    names = lambda **limit: [r.clip for r in first_of_each_split(corpus, limit)]
    assert names(train=2) == ['c0', 'c4'] and names(train=3) == ['c0', 'c4', 'c6']
    assert names(train=5) == ['c0', 'c1', 'c4', 'c5', 'c6']       # first clips of a, b, c, then second ones of a and b
    assert names(train=99, val=1) == [r.clip for r in corpus]
    assert names(train=1, val=1) == ['c0', 'c2'] and names(train=0, val=1) == ['c2']
    assert first_of_each_split(corpus) is corpus
    with pytest.raises(InputError, match='has no split test; it has train, val'): first_of_each_split(corpus, dict(test=1))


def test_the_hash_of_a_rendered_corpus_is_that_of_its_manifest(built, tmp_path):
    import hashlib, shutil
    whole = corpus_hash(built)
    assert whole == hashlib.sha256((built.root/'manifest.csv').read_bytes()).hexdigest()
    shutil.copytree(built.root, tmp_path/'copy'); assert corpus_hash(RenderedCorpus(tmp_path/'copy')) == whole
    parts = [corpus_hash(RenderedCorpus(built.root, (split,))) for split in ('train', 'test')]
    chosen = corpus_hash(first_of_each_split(built, dict(train=1)))
    assert len({whole, *parts, chosen}) == 4
    assert chosen == corpus_hash(first_of_each_split(RenderedCorpus(tmp_path/'copy'), dict(train=1)))


def test_the_hash_of_a_folder_follows_names_sizes_and_records(tmp_path):
    def put(name, text): (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).write_text(text)
    seen = set()
    def new(): value = corpus_hash(FolderCorpus(tmp_path)); fresh = value not in seen; seen.add(value); return fresh
    put('ann/a.mp4', 'xx'); put('ann/b.mp4', 'xx'); assert new() and not new()
    put('ann/a.mp4', 'yy'); assert not new()                         # as said: a change of the same size is not seen
    put('ann/a.mp4', 'xxx'); assert new()
    put('ann/c.mp4', 'xx'); assert new()
    put('ann/a.wav', 'x'); assert new()
    put('landmarks/a.npz', 'x'); assert new()
    put('landmarks/a.npz', 'xx'); assert new()
    (tmp_path/'ann'/'b.mp4').rename(tmp_path/'ann'/'d.mp4'); assert new()
    put('ann/a.txt', 'HELLO'); assert new()
    here, there = FolderCorpus(tmp_path), crowd(('train', 'a'))
    assert corpus_hash(here) == corpus_hash(Selection('x', '', tuple(here))) and corpus_hash(there) not in seen


def test_a_folder_without_videos(tmp_path):
    with pytest.raises(InputError, match='no videos under'): FolderCorpus(tmp_path)
    with pytest.raises(InputError, match='no such folder'): FolderCorpus(tmp_path/'nowhere')


def test_tracks_come_back_on_their_grid_and_have_fixed_bytes(tmp_path):
    draw = np.random.default_rng(0)
    tracks = dict(landmarks=draw.uniform(0, 160, (30, 68, 2)), valid=draw.random(30) > .1, phones=np.array(['tʃ', 'a']))
    a, b = (save_tracks(tmp_path/name, tracks) for name in ('a.npz', 'b.npz'))
    assert a.read_bytes() == b.read_bytes()
    read = load_tracks(a)
    assert np.abs(read['landmarks'] - tracks['landmarks']).max() <= 1/32 + 1e-5 and read['landmarks'].flags.c_contiguous
    assert (read['valid'] == tracks['valid']).all() and list(read['phones']) == ['tʃ', 'a']
    with np.load(a) as plain: assert np.array_equal(plain['landmarks'], read['landmarks'])


@pytest.mark.parametrize('damage', [b'', b'not a zip', None])
def test_damaged_tracks_are_named(tmp_path, damage):
    path = save_tracks(tmp_path/'a.npz', dict(landmarks=np.zeros((5, 68, 2))))
    path.write_bytes(path.read_bytes()[:-30] if damage is None else damage)
    with pytest.raises(InputError, match='a.npz'): load_tracks(path)
    with pytest.raises(InputError, match='no such track file'): load_tracks(tmp_path/'none.npz')


def test_jittered_boxes_tremble_and_drift_but_stay_near():
    boxes = np.tile([20., 10., 120., 140.], (400, 1))
    shaken = jitter_boxes(boxes, 1)
    assert np.array_equal(shaken, jitter_boxes(boxes, 1)) and not np.array_equal(shaken, jitter_boxes(boxes, 2))
    assert np.abs(shaken.mean(0) - boxes[0]).max() < 3 and 1 < np.diff(shaken, axis=0).std() < 4
    assert (shaken[:, 2:] > shaken[:, :2]).all()
