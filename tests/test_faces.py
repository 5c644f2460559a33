"Tracks, boxes, crops and mouth crops: geometry as properties, and what bad input says."
import numpy as np
import pytest

from talkingface.core import InputError, MissingWeights, rng
from talkingface.data import faces as F
from talkingface.data.faces import (MEAN_FACE, FaceAlignmentTracker, StoredTracks, Track, crop_faces, face_box, fill_tracks, from_crop,
                                    mouth_crops, mouth_matrices, paste_faces, similarity, smooth_boxes, to_crop)


def moved_faces(frames=20, seed=0, yaw=True):
    "Mean faces, scaled, turned and shifted by random amounts."
    draw = rng(seed, 'faces'); out = []
    for _ in range(frames):
        turn, scale = draw.uniform(-.3, .3), draw.uniform(.4, 2.5)
        matrix = scale*np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        squeeze = np.array([draw.uniform(.8, 1) if yaw else 1, 1])
        out.append(((MEAN_FACE - 128)*squeeze) @ matrix.T + draw.uniform(100, 300, 2))
    return np.array(out, np.float32)


def opened(landmarks, share):
    "The same faces with the jaw and lower lip dropped by `share` of the jaw width."
    out = landmarks.copy(); width = np.ptp(landmarks[:, :17, 0], axis=1)[:, None]
    out[:, 5:12, 1] += share*width; out[:, [55, 56, 57, 58, 59, 65, 66, 67], 1] += share*width
    return out


def test_box_ignores_the_jaw():
    upright = np.tile(MEAN_FACE, (3, 1, 1))*np.array([.5, 1, 2])[:, None, None]
    np.testing.assert_allclose(face_box(upright), face_box(opened(upright, .12)), atol=1e-3)


def test_mouth_is_in_the_lower_half():
    landmarks = moved_faces(200)
    for share in (0, .1):
        inside = to_crop(opened(landmarks, share), face_box(landmarks))[:, 48:68, 1]
        assert inside.min() >= 48 and inside.max() < 95.5


def test_box_follows_scale_and_shift():
    landmarks = moved_faces(30)
    np.testing.assert_allclose(face_box(landmarks*2 + 7), face_box(landmarks)*2 + 7, rtol=1e-4)


def test_smoothing_ignores_gaps_and_keeps_lines():
    line = np.arange(40.).reshape(10, 4); np.testing.assert_allclose(smooth_boxes(line)[2:-2], line[2:-2])
    line[4] = np.nan; smooth = smooth_boxes(line)
    assert np.isnan(smooth[4]).all() and np.isfinite(np.delete(smooth, 4, 0)).all()


@pytest.mark.parametrize('side', [40, 96, 131.7, 420.3])
def test_crop_geometry_is_that_of_to_crop(side):
    "A bright dot lands where `to_crop` says, to a fraction of a pixel, at any scale."
    x, y = 230.4, 251.8; box = np.array([[x - .37*side, y - .61*side, x + .63*side, y + .39*side]])
    ys, xs = np.mgrid[:500, :500]; width = max(4., side/30)
    dot = (255*np.exp(-((xs - x)**2 + (ys - y)**2)/(2*width**2))).astype(np.uint8)
    crop = crop_faces(np.repeat(dot[None, ..., None], 3, -1), box)[0, :, :, 0].astype(float)
    expected = to_crop(np.array([[[x, y]]]), box)[0, 0]
    peak = crop > crop.max()/2; rows, columns = np.nonzero(peak); weight = crop[peak]
    found = np.array([(columns*weight).sum(), (rows*weight).sum()])/weight.sum()
    assert np.abs(found - expected).max() < .25


def test_crop_and_frame_coordinates_are_inverse():
    landmarks = moved_faces(); boxes = face_box(landmarks)
    np.testing.assert_allclose(from_crop(to_crop(landmarks, boxes), boxes), landmarks, atol=1e-3)


@pytest.mark.parametrize('side', [50, 96, 250])
def test_paste_undoes_crop_on_a_smooth_picture(side):
    ys, xs = np.mgrid[:300, :320]; picture = np.stack([.6*xs, .7*ys, 60 + .3*xs + .2*ys], -1).astype(np.uint8)[None]
    box = np.array([[31.3, 18.9, 31.3 + side, 18.9 + side]])
    assert np.abs(paste_faces(picture, crop_faces(picture, box), box).astype(int) - picture).max() <= 2


def test_paste_touches_nothing_outside_and_only_its_region():
    draw = rng(0); frames = draw.integers(0, 256, (2, 120, 140, 3), np.uint8); before = frames.copy()
    boxes = np.array([[20.5, 30.2, 80.7, 110.1], [-30., -20., 50., 60.]])
    out = paste_faces(frames, np.zeros((2, 96, 96, 3), np.uint8), boxes, region=(0, .5, 1, 1))
    changed = (out != frames).any(-1); assert (frames == before).all() and changed.any((1, 2)).all()
    rows = [np.flatnonzero(c.any(1)) for c in changed]
    assert rows[0].min() >= 70 and rows[0].max() <= 110 and rows[1].min() >= 20 and rows[1].max() <= 60


def test_paste_beside_the_frame_changes_nothing():
    frames = np.full((1, 40, 40, 3), 9, np.uint8)
    assert (paste_faces(frames, np.zeros((1, 96, 96, 3), np.uint8), [[50, 50, 90, 90]]) == 9).all()


def test_similarity_of_noisy_points_is_least_squares():
    "No small change of the fitted transform lowers the error."
    draw = rng(1); source = draw.normal(0, 40, (3, 5, 2)); target = draw.normal(0, 40, (5, 2))
    error = lambda m: ((np.einsum('tij,tpj->tpi', m[:, :, :2], source) + m[:, None, :, 2] - target)**2).sum((1, 2))
    best = similarity(source, target)
    for a, b, x, y in draw.normal(0, 1e-2, (20, 4)):
        other = best + np.array([[a, -b, 100*x], [b, a, 100*y]]); assert (error(other) > error(best)).all()


def test_mouth_crop_is_centred_on_the_mouth():
    landmarks = np.tile(moved_faces(1), (30, 1, 1)) + np.arange(30)[:, None, None]
    matrices = mouth_matrices(landmarks)
    centre = np.einsum('tij,j->ti', matrices[:, :, :2], [48., 48.]) + matrices[:, :, 2]
    scale = np.linalg.norm(matrices[0, :, 0]); assert np.abs(centre - landmarks[:, 48:68].mean(1)).max() <= .71*scale


def test_mouth_crops_in_pieces_equal_the_whole():
    draw = rng(2); landmarks = np.tile(MEAN_FACE, (20, 1, 1)) + draw.normal(0, 2, (20, 68, 2))
    frames = draw.integers(0, 256, (20, 256, 256, 3), np.uint8); matrices = mouth_matrices(landmarks)
    pieces = [mouth_crops(frames[i:i + 7], None, matrices=matrices[i:i + 7]) for i in range(0, 20, 7)]
    assert (np.concatenate(pieces) == mouth_crops(frames, landmarks)).all()


def test_short_clip_has_mouth_crops():
    assert mouth_matrices(MEAN_FACE[None]).shape == (1, 2, 3)


@pytest.mark.parametrize('call, message', [
    (lambda: Track(np.zeros((3, 5, 2)), np.zeros((3, 4)), np.ones(3)), r'expected \(T,68,2\)'),
    (lambda: Track(np.zeros((3, 68, 2)), np.zeros((2, 4)), np.ones(3)), 'needs boxes'),
    (lambda: crop_faces(np.zeros((2, 9, 9, 3), np.uint8), np.zeros((1, 4))), '2 frames need boxes'),
    (lambda: crop_faces(np.zeros((1, 9, 9, 3), np.uint8), [[5, 5, 2, 9]]), 'x0 < x1'),
    (lambda: mouth_matrices(np.full((2, 68, 2), np.nan)), 'fill_tracks'),
    (lambda: paste_faces(np.zeros((2, 9, 9, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8), np.zeros((2, 4))), 'each of 2 frames, got 1'),
    (lambda: StoredTracks(boxes='wobbly').track('x.mp4'), 'boxes_jittered')])
def test_bad_arguments_are_explained(call, message):
    with pytest.raises(InputError, match=message): call()


def test_nan_landmarks_are_not_valid():
    landmarks = np.tile(MEAN_FACE, (6, 1, 1)); landmarks[0] = np.nan; landmarks[3, 5, 0] = np.nan
    track = fill_tracks(Track(landmarks, face_box(landmarks), np.ones(6)))
    assert track.valid.tolist() == [False, True, True, False, True, True] and np.isfinite(track.landmarks).all()
    assert np.isfinite(track.boxes).all()
    with pytest.raises(InputError, match='no face in any of 6'): fill_tracks(Track(landmarks, face_box(landmarks), np.zeros(6)))


def test_stored_tracks_are_found_in_sister_folders(tmp_path):
    (tmp_path/'clips').mkdir(); (tmp_path/'landmarks').mkdir(); video = tmp_path/'clips'/'one.mp4'
    np.savez(tmp_path/'landmarks'/'one.npz', landmarks=np.tile(MEAN_FACE, (4, 1, 1)), bbox=np.zeros((4, 4)), valid=np.ones(4, bool))
    assert len(StoredTracks().track(video)) == 4
    (tmp_path/'landmarks'/'one.npz').write_bytes(b'PK\x03\x04 and no more')
    with pytest.raises(InputError, match='not a readable track file'): StoredTracks().track(video)


def test_a_video_that_does_not_exist_is_what_the_error_says(tmp_path):
    video = tmp_path/'clips'/'one.mp4'; video.parent.mkdir()
    for tracker in (StoredTracks(), StoredTracks(tmp_path)):
        with pytest.raises(InputError, match=f'^no such file: {video}'): tracker.track(video)
    with pytest.raises(InputError, match='^no such file: .*one.npz'): StoredTracks().track(video.with_suffix('.npz'))
    video.touch()
    with pytest.raises(InputError, match='^no track file for .*choose another tracker'): StoredTracks().track(video)


def test_tracks_of_a_video_that_is_only_named_are_read(tmp_path):
    np.savez(tmp_path/'one.npz', landmarks=np.tile(MEAN_FACE, (4, 1, 1)))
    for path in ('one.mp4', 'one.npz'): assert len(StoredTracks().track(tmp_path/path)) == 4
    assert len(StoredTracks(tmp_path).track('elsewhere/one.mp4')) == 4


def test_stored_jitter_moves_our_box_by_its_share(tmp_path):
    landmarks = np.tile(MEAN_FACE, (4, 1, 1)); clean = np.tile([0., 0, 100, 200], (4, 1)); off = clean + [10, 20, 10, 20]
    np.savez(tmp_path/'a.npz', landmarks=landmarks, boxes=clean, boxes_jittered=off)
    plain, moved = (StoredTracks(boxes=b).track(tmp_path/'a.mp4').boxes for b in ('boxes', 'boxes_jittered'))
    size = plain[:, 2:] - plain[:, :2]; np.testing.assert_allclose(moved - plain, np.tile(.1*size, 2), rtol=1e-4)


class FakeNetworks:
    "Stands in for face-alignment: a detector that loses the face after frame 9, landmarks at the box."
    def __init__(self): self.face_detector, self.detections, self.seen = self, 0, 0
    def detect_from_image(self, image):
        self.detections += 1
        return [] if image.mean() > 128 else [np.array([10, 10, 90, 110, .9])*image.shape[0]/128]
    def get_landmarks_from_image(self, frame, detected_faces):
        self.seen += 1
        return [MEAN_FACE*.4 + detected_faces[0][:2]]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    networks = FakeNetworks()
    monkeypatch.setattr(F, '_networks', lambda device, folder: networks)
    monkeypatch.setattr(FaceAlignmentTracker, 'check', lambda self: None)
    return networks


def film(path, frames=20, dark=10, size=128):
    from talkingface.data.video import write_video
    video = np.full((frames, size, size, 3), 40, np.uint8); video[dark:] = 200
    write_video(path, video); return path


def test_tracker_detects_every_fifth_frame_and_caches(fake, tmp_path):
    video = film(tmp_path/'a.mp4'); tracker = FaceAlignmentTracker(cache=tmp_path/'cache')
    track = tracker.track(video)
    assert fake.detections == 5 and len(track) == 20       # frames 0, 5, 10, 15 and the last
    assert track.valid.tolist() == [True]*6 + [False]*14 and fake.seen == 6
    again = tracker.track(video); assert fake.detections == 5
    np.testing.assert_array_equal(again.landmarks, track.landmarks); np.testing.assert_allclose(again.boxes, track.boxes)
    video.rename(tmp_path/'b.mp4'); tracker.track(tmp_path/'b.mp4'); assert fake.detections == 5


def test_tracker_shrinks_for_detection_only(fake, tmp_path):
    track = FaceAlignmentTracker(max_side=64).track(film(tmp_path/'a.mp4', frames=6, dark=99))
    np.testing.assert_allclose(track.landmarks[0], MEAN_FACE*.4 + 10, atol=.01)


def test_missing_weights_name_file_folder_and_source(tmp_path, monkeypatch):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(MissingWeights) as caught: FaceAlignmentTracker().check()
    for part in ('s3fd-619a316812.pth', str(tmp_path), 'https://'): assert part in str(caught.value)
    (tmp_path/'s3fd-619a316812.pth').touch()
    with pytest.raises(MissingWeights, match='2DFAN4-11f355bf06'): FaceAlignmentTracker().check()


def test_the_published_mean_face_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    np.save(tmp_path/'20words_mean_face.npy', MEAN_FACE + 1); np.testing.assert_allclose(F.mean_face(published=True), MEAN_FACE + 1)
    np.save(tmp_path/'20words_mean_face.npy', np.zeros((5, 2)))
    with pytest.raises(InputError, match='68 points'): F.mean_face(published=True)
