"""The rendered face: the same seed gives the same bytes, landmarks lie on what is drawn, lips close."""
import cv2
import numpy as np
import pytest

from talkingface.core import InputError
from talkingface.data.portrait import (Articulation, Identity, Scene, contact_sheet, loudness, mark_landmarks, mouth_shape,
                                       performance, render, render_clip, rotation)
from talkingface.data.speech import VISEMES

OPEN = Articulation(jaw=.9, wide=.1, round=0, close=0, lip_teeth=0, upper_lip=.2, open=.3, tongue=.1)
REST = Articulation(jaw=0, wide=0, round=0, close=.6, lip_teeth=0, upper_lip=0, open=0, tongue=.2)


@pytest.fixture(scope='module')
def people(): return [Identity(seed) for seed in range(8)]


@pytest.fixture(scope='module')
def clip(people):
    visemes = np.stack([OPEN, REST, OPEN, REST, OPEN, REST]).astype(np.float32)
    motion = performance(3, 6, visemes, np.zeros(6*640), 'lively')
    return render_clip(people[0], Scene(people[0], 3, 160), visemes, motion)


def test_channels_are_those_of_the_speech(): assert Articulation._fields == tuple(VISEMES)


def test_same_seed_same_bytes(people):
    first, second = people[1], Identity(1)
    for name in ('skin_layer', 'hair_layer', 'alpha', 'relief', 'normals'):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes(), name
    shots = [render(f, Scene(f, 5, 160), OPEN, (.2, .1, 0, 2, 1, 1.02), frame=4) for f in (first, second)]
    assert shots[0].image.tobytes() == shots[1].image.tobytes() and shots[0].landmarks.tobytes() == shots[1].landmarks.tobytes()


def test_bytes_do_not_depend_on_opencv_threads(people):
    threads = cv2.getNumThreads(); images = []
    try:
        for n in (1, 4):
            cv2.setNumThreads(n); face = Identity(2)
            images.append(render(face, Scene(face, 2, 256), OPEN).image.tobytes())
    finally: cv2.setNumThreads(threads)
    assert images[0] == images[1]


def test_no_global_random_state(people):
    np.random.seed(0); before = np.random.get_state()[1].copy()
    face = Identity(3); performance(0, 50, np.zeros((50, 8)), np.zeros(0)); render(face, Scene(face, 0, 96), REST)
    assert (np.random.get_state()[1] == before).all()


def test_people_differ(people):
    images = [render(f, Scene(f, 0, 96), REST).image.astype(float) for f in people]
    assert min(np.abs(a - b).mean() for i, a in enumerate(images) for b in images[:i]) > 5


def test_a_large_seed_is_a_person_too():
    face = Identity(2**62 + 12345)
    assert render(face, Scene(face, 2**61 + 1, 96), OPEN).image.std() > 20


@pytest.mark.parametrize('size', [96, 160, 256, 288])
def test_landmarks_and_box_in_the_frame(people, size):
    for face in people[:4]:
        shot = render(face, Scene(face, 1, size), REST)
        assert shot.image.shape == (size, size, 3) and shot.image.dtype == np.uint8
        assert shot.landmarks.shape == (68, 2) and shot.landmarks.dtype == np.float32 and shot.visible.dtype == bool
        assert (shot.landmarks >= 0).all() and (shot.landmarks <= size - 1).all()
        x0, y0, x1, y1 = shot.box; x, y = shot.landmarks.T
        assert x0 <= x.min() + 3 and x1 >= x.max() - 3 and y0 < y.min() and y1 > y.max()


def test_aperture_grows_with_the_jaw_and_lips_close(people):
    for face in people:
        scene = Scene(face, 0, 96)
        apertures = [render(face, scene, OPEN._replace(jaw=jaw, close=0)).aperture for jaw in (0., .25, .5, .75, 1.)]
        assert (np.diff(apertures) > 0).all() and apertures[-1] > .1*scene.scale
        for jaw in (0., .5, 1.): assert render(face, scene, OPEN._replace(jaw=jaw, close=1)).aperture == 0


def test_closed_lips_hide_the_cavity(people):
    "The tongue is seen between open lips and changes no pixel behind closed ones."
    for face in people[:4]:
        scene = Scene(face, 0, 256); tongue = lambda said: [render(face, scene, said._replace(tongue=t)).image for t in (0., .8)]
        assert np.array_equal(*tongue(OPEN._replace(close=1))) and not np.array_equal(*tongue(OPEN))


def test_box_does_not_follow_the_mouth(people):
    scene = Scene(people[0], 0, 160); wide, rest = render(people[0], scene, OPEN), render(people[0], scene, REST)
    assert (wide.box == rest.box).all()
    assert wide.landmarks[8, 1] < wide.box[3]                            # and it holds the chin of an open mouth


def test_landmarks_lie_on_the_drawn_features(people):
    "The inner mouth changes where its landmarks say; the eyes darken between theirs; nothing else moves with the tongue."
    face = people[1]; scene = Scene(face, 0, 256); pose = (.3, .1, .1, 6, -4, 1.)
    low, high = (render(face, scene, OPEN._replace(tongue=t), pose) for t in (0., .6))
    changed = np.argwhere(np.abs(low.image.astype(int) - high.image).max(-1) > 12)[:, ::-1]
    inner = low.landmarks[60:68]
    assert len(changed) > 50
    assert (changed.min(0) >= inner.min(0) - 2).all() and (changed.max(0) <= inner.max(0) + 2).all()


def test_blink_closes_the_eye_landmarks(people):
    scene = Scene(people[0], 0, 256); gap = lambda s: np.linalg.norm(s.landmarks[37] - s.landmarks[41])
    assert gap(render(people[0], scene, REST, blink=1.)) < 1 < 3 < gap(render(people[0], scene, REST))


def test_visibility_follows_hair_and_pose(people):
    hidden = [~render(f, Scene(f, 0, 160), REST).visible for f in people]
    assert any(h[:17].any() or h[17:27].any() for h in hidden)          # somebody's hair covers brows or jaw
    assert not any(h[48:68].any() for h in hidden)                      # nobody's covers the mouth
    face = next(f for f in people if f.style in ('crop', 'side', 'bald', 'receding'))
    left, right = (render(face, Scene(face, 0, 160), REST, (yaw, 0, 0, 0, 0, 1)).visible for yaw in (-.5, .5))
    assert left[2:6].sum() < right[2:6].sum() and right[11:15].sum() < left[11:15].sum()


def test_yaw_moves_the_nose_and_roll_turns(people):
    scene = Scene(people[0], 0, 160); nose = lambda yaw: render(people[0], scene, REST, (yaw, 0, 0, 0, 0, 1)).landmarks[30, 0]
    assert nose(-.3) < nose(0) - 3 < nose(0) + 3 < nose(.3)
    turn = rotation(.2, .1, -.3); assert np.allclose(turn @ turn.T, np.eye(3)) and np.isclose(np.linalg.det(turn), 1)


def test_pose_drifts_and_lively_is_stronger():
    visemes = np.zeros((100, 8)); pose = {s: np.stack([performance(i, 100, visemes, np.zeros(64000), s).pose for i in range(12)])
                                          for s in ('calm', 'lively')}
    assert pose['calm'].std(1)[..., :3].min() > .005
    assert (pose['lively'].std(1).mean(0) > 1.3*pose['calm'].std(1).mean(0)).all()
    lights = performance(0, 100, visemes, np.zeros(0), 'lively').light
    assert lights.std(0).min() > .01 and (performance(0, 100, visemes, np.zeros(0)).light == [0, 1]).all()


def test_nods_follow_the_voice():
    wav = np.zeros(100*640); wav[30*640:60*640] = np.random.default_rng(0).normal(0, .2, 30*640)
    level = loudness(wav, 100)
    assert level[:25].max() < .05 < .8 < level[35:55].min()
    assert np.isfinite(loudness(wav[:700], 100)).all() and (loudness([], 10) == 0).all()


def test_blinks_happen_and_reopen():
    blink = np.stack([performance(i, 200, np.zeros((200, 8)), np.zeros(0)).blink for i in range(6)])
    assert (blink.max(1) == 1).all() and (blink == 0).mean() > .7


def test_motion_is_as_long_as_asked():
    motion = performance(0, 29, np.zeros((29, 8)), np.zeros(100))
    assert len(motion) == 29 and len(list(motion)) == 29 and motion.pose.dtype == np.float32


def test_clip_is_its_frames(people, clip):
    assert clip.frames.shape == (6, 160, 160, 3) and clip.boxes.shape == (6, 4) and clip.aperture.shape == (6,)
    assert (clip.aperture[1::2] == 0).all() and (clip.aperture[::2] > 5).all()
    assert mouth_shape(people[0], REST).drop == 0


def test_bad_input(people):
    with pytest.raises(InputError, match='at least 64'): Scene(people[0], 0, 32)
    with pytest.raises(InputError, match='calm'): performance(0, 5, np.zeros((5, 8)), np.zeros(0), 'wild')
    motion = performance(0, 5, np.zeros((5, 8)), np.zeros(0)); scene = Scene(people[0], 0, 96)
    with pytest.raises(InputError, match=r'\(T,8\)'): render_clip(people[0], scene, np.zeros((5, 7)), motion)
    with pytest.raises(InputError, match='at least as long'): render_clip(people[0], scene, np.zeros((6, 8)), motion)
    with pytest.raises(InputError, match='at least as long'): render_clip(people[0], scene, np.zeros((0, 8)), motion)


def test_sheets(people):
    shot = render(people[0], Scene(people[0], 0, 96), REST)
    assert contact_sheet([shot.image]*7, 3).shape == (288, 288, 3) and (mark_landmarks(shot) != shot.image).any()
