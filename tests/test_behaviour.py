"""The truth made worse: what changes, what does not, and that the scores follow."""
import numpy as np
import pandas as pd
import pytest

from talkingface.behaviour import (DEGRADATIONS, BehaviourParams, GeneratedSource, answers, behaviour_figure, degraded, evaluate_behaviour,
                                   shift_figure)
from talkingface.core import InputError, ParamsError
from talkingface.data.clips import ClipStore, prepare
from talkingface.data.corpora import open_corpus
from talkingface.dubbing import save_faces
from talkingface.metrics.report import Scorers
from talkingface.robustness import Source


@pytest.fixture(scope='module')
def corpus(root):
    folder = root/'data'/'corpus'
    if not folder.is_dir(): pytest.skip('no data/corpus: dvc pull')
    return open_corpus(folder)


@pytest.fixture(scope='module')
def store(corpus, tmp_path_factory):
    records = [r for r in corpus if r.split == 'words' and r.text][:2]; out = tmp_path_factory.mktemp('behaviour')/'store'
    prepare(records, out, workers=1)
    return ClipStore(out)


@pytest.fixture(scope='module')
def source(corpus, store):
    clip = store[0]
    return Source(next(r for r in corpus if r.clip == clip.name), clip)


@pytest.mark.parametrize('name', list(DEGRADATIONS))
def test_nothing_changes_at_the_neutral_level(source, name):
    faces, wav = degraded(source, DEGRADATIONS[name], DEGRADATIONS[name].neutral)
    assert np.array_equal(faces, source.clip.faces) and np.array_equal(wav, source.clip.wav)


@pytest.mark.parametrize('name', list(DEGRADATIONS))
def test_pictures_or_sound_change_and_grow_apart(source, name):
    "Each degradation touches what it says, and more of it changes more."
    how = DEGRADATIONS[name]; levels = [v for v in how.grid() if v >= how.neutral][1:]
    far = []
    for level in (levels[0], levels[-1]):
        faces, wav = degraded(source, how, level)
        sound, picture = np.abs(wav - source.clip.wav).mean(), np.abs(faces.astype(float) - source.clip.faces).mean()
        assert (sound > 0, picture > 0) == ((True, False) if how.changes == 'sound' else (False, True))
        far.append(max(sound, picture))
    if name != 'late': assert far[1] > far[0]


def test_a_held_mouth_leaves_the_rest_of_the_face_alone(source):
    faces, _ = degraded(source, DEGRADATIONS['hold'], 25); changed = np.abs(faces.astype(int) - source.clip.faces).max((0, 1))
    mouth = np.asarray(source.clip.landmarks)[:, 48:68]; top, side = mouth[..., 1].min(), mouth[..., 0].min()
    assert changed[:int(top) - 16].max() == 0 and changed[:, :max(0, int(side) - 16)].max() == 0 and changed.max() > 20


def test_scores_of_pictures_follow_blur_and_ignore_late_sound(corpus, store):
    params = BehaviourParams(['words'], 2, ['psnr', 'ssim', 'mse', 'flicker', 'lse_c', 'fid_corpus'],
                             {'blur': [1, 2], 'picture_noise': [], 'h264': [], 'shift_x': [-10, 10], 'hold': [], 'late': [2, 5]})
    rows = evaluate_behaviour(corpus, store, Scorers(), params, 'toy')
    assert set(rows['metric']) == {'psnr', 'ssim', 'mse', 'flicker'}                     # nothing is scored without its network
    found = answers(rows).set_index(['metric', 'degradation'])['answer']
    assert found['psnr', 'blur'] == found['ssim', 'blur'] == found['mse', 'blur'] == 1 and found['ssim', 'late'] == 0
    figure, data = shift_figure(rows, [('picture', ['ssim'])]); assert sorted(data['level']) == [-10, 0, 10]
    assert set(behaviour_figure(rows)[1]['degradation']) == {'blur', 'shift_x', 'late'}
    again = evaluate_behaviour(corpus, store, Scorers(), params, 'toy')
    pd.testing.assert_frame_equal(rows, again)


def test_generated_faces_are_put_back_into_the_frames_before_these_are_shifted(corpus, store, source, tmp_path):
    clip, how = store[0], DEGRADATIONS['shift_x']; made = 255 - np.asarray(clip.faces)
    ours = GeneratedSource(next(r for r in corpus if r.clip == clip.name), clip, made)
    inner = np.s_[..., 16:80, 16:80]; apart = lambda a, b: float(np.abs(a[inner].astype(float) - b[inner]).mean())
    assert apart(degraded(ours, how, 0)[0], made) < 6 < 40 < apart(degraded(ours, how, 0)[0], clip.faces)
    assert apart(degraded(ours, how, 6)[0], 255 - degraded(source, how, 6)[0]) < 6                    # moved as the truth moves
    params = BehaviourParams(['words'], 2, levels={'late': [2]}).only('shift_x', ['psnr']); assert {how.name for how, _ in params.plan()} == {'shift_x'}
    with pytest.raises(InputError, match='has no faces of'): evaluate_behaviour(corpus, store, Scorers(), params, 'toy', generated=tmp_path)
    for clip in store: save_faces(tmp_path/f'{clip.name}.safetensors', np.asarray(clip.faces))
    rows = evaluate_behaviour(corpus, store, Scorers(), params, 'toy', generated=tmp_path)
    assert set(rows['degradation']) == {'shift_x'} and np.isfinite(rows[rows['level'] == 0]['value']).all()     # the way through the frames costs something


def test_wrong_settings_are_named():
    with pytest.raises(ParamsError, match='behaviour.levels'): BehaviourParams(levels={'hod': [2]})
    with pytest.raises(InputError, match='at least 2'): BehaviourParams(clips=1)
