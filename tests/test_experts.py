"""Sync experts and the mouth landmarker: contract, geometry of windows, sign of the offset, precision, damage."""
import subprocess
import sys

import pytest
import torch
from torch import nn

from talkingface.core import InputError, ParamsError
from talkingface.data.audio import mfcc
from talkingface.experts.avsyncnet import AVSyncNet, ResNet50, ResNetSE34L, ResNetSE34V2
from talkingface.experts.base import (SyncExpert, WindowExpert, best_offset, check_expert, embed_clip, face_windows, frozen,
                                      offset_scores, similarity_curve, speech_windows, unit_length)
from talkingface.experts.landmarks import LipLandmarker, mouth_shape
from talkingface.experts.syncnet import LightSyncNet, SyncNet, SyncNetV2
from talkingface.experts.checkpoints import EXPERTS, build_expert
from talkingface.layers import FiLM, gflop, lower_half_bgr, parameter_count, warp

torch.set_num_threads(1)
NETS = [lambda: SyncNet(.125), lambda: SyncNet(.125, relu=False),
        lambda: LightSyncNet(8, 16), lambda: LightSyncNet(8, 16, relu=True),
        lambda: AVSyncNet(.125, 32, size=96), lambda: AVSyncNet(.125, 32, 'V2', relu=False, size=64)]


def seeded(seed=0): return torch.Generator().manual_seed(seed)


# ---- contract

@pytest.mark.parametrize('make', [*NETS, lambda: SyncNetV2(.125, 32), lambda: AVSyncNet(.125, audio_width=.5)])
def test_contract(make): check_expert(make())


@pytest.mark.parametrize('size', [64, 160])
def test_contract_at_other_crop_sizes(size): check_expert(LightSyncNet(8, 16), size=size)


def test_check_restores_the_mode():
    net = LightSyncNet(8, 16).train()
    check_expert(net)
    assert net.training


def test_check_catches_wrong_range_and_leaks_between_windows():
    class Wrong(LightSyncNet):
        "Says that its cosine is never negative, and always is."
        def similarity(self, v, a): return -super().similarity(v, a).abs()
    with pytest.raises(AssertionError, match='cosine out of its range'): check_expert(Wrong(8, 16, relu=True))

    class Blurred(LightSyncNet):
        "Averages embeddings over the clip: dense is not one by one."
        def embed_video(self, faces): v = super().embed_video(faces); return unit_length(v + v.mean(1, keepdim=True))
    with pytest.raises(AssertionError, match='dense embeddings differ'): check_expert(Blurred(8, 16))


OPTIONS = dict(syncnet=dict(width=.125), light_syncnet=dict(width=8, dim=16), syncnet_v2=dict(width=.125, dim=32),
               avsyncnet=dict(width=.125, dim=32, audio='V2', size=96, audio_width=.25))


@pytest.mark.parametrize('name', [name for name in OPTIONS if name in EXPERTS])
def test_config_rebuilds(name):
    net = EXPERTS[name](**OPTIONS[name])
    again = build_expert(net.config)
    again.load_state_dict(net.state_dict(), strict=True)
    assert again.config == net.config


@pytest.mark.parametrize('config, message', [
    (dict(name='sincnet'), "did you mean 'syncnet'"), (dict(name='syncnet', wide=1), "unknown key 'wide'"),
    (dict(), 'unknown key')])
def test_bad_config(config, message):
    with pytest.raises(ParamsError, match=message): build_expert(config)


def test_sizes():
    assert parameter_count(SyncNet()) == 16_435_072
    pair = torch.rand(1, 5, 3, 96, 96), torch.randn(1, 80, 16)
    assert .10 < gflop(LightSyncNet().eval(), *pair) < .13
    assert 2.3 < gflop(SyncNet().eval(), *pair) < 2.5


# ---- windows

def test_face_window_is_bgr_lower_half_in_time_order():
    faces = torch.zeros(1, 6, 3, 96, 96)
    faces[0, 3, 0, 60, 10] = 1.                              # red, frame 3, row 60
    windows = face_windows(faces)
    for start in range(2):
        hot = windows[0, start].nonzero()
        assert hot.tolist() == [[3*(3 - start) + 2, 12, 10]]    # red is last of its frame; row 60 - 48


def test_mel_window_columns():
    mel = torch.arange(200.).expand(1, 80, 200)
    starts = speech_windows(mel)[0, :, 0, 0].tolist()
    assert starts == [int(80*f/25) for f in range(len(starts))]
    assert speech_windows(mel[..., :16]).shape == (1, 1, 80, 16)


@pytest.mark.parametrize('frames', [5, 6, 7, 25, 29, 100])
def test_as_many_positions_in_sound_as_in_picture(frames):
    net = LightSyncNet(8, 16).eval()
    v, a = embed_clip(net, torch.zeros(frames, 3, 96, 96, dtype=torch.uint8), torch.randn(640*frames, generator=seeded()))
    assert v.shape == a.shape == (frames - 4, 16)


@pytest.mark.parametrize('faces', [torch.zeros(1, 4, 3, 96, 96), torch.zeros(5, 3, 96, 96), torch.zeros(1, 5, 1, 96, 96)])
def test_bad_faces(faces):
    with pytest.raises(InputError): LightSyncNet(8, 16).embed_video(faces)


def test_bad_mel():
    with pytest.raises(InputError, match='at least 16 columns'): LightSyncNet(8, 16).embed_audio(torch.zeros(1, 80, 15))


# ---- AVSyncNet

@torch.no_grad()
def test_resnet50_is_torchvisions():
    "Same keys, and with the same weights the same numbers, on a half face and on an odd size."
    torchvision = pytest.importorskip('torchvision')
    torch.manual_seed(0)
    ours, theirs = ResNet50().eval(), torchvision.models.resnet50().eval()
    state = {key: 1 + .2*torch.rand(value.shape) if 'running_var' in key else value + .1*torch.randn(value.shape)
             if value.is_floating_point() and value.ndim == 1 else value for key, value in theirs.state_dict().items()}
    for net in (ours, theirs): net.load_state_dict(state, strict=True)
    for shape in ((2, 3, 112, 224), (1, 3, 65, 97)):
        images = torch.randn(shape, generator=seeded())
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)


def test_resnet50_starts_as_torchvisions():
    "Deviation of the initial weights: sqrt(2 / fan out) in each convolution."
    for name, part in ResNet50(15, 512, width=.5).named_modules():
        if isinstance(part, nn.Conv2d):
            want = (2/(part.out_channels*part.kernel_size[0]**2))**.5
            assert abs(part.weight.std().item()/want - 1) < .1, name


@pytest.mark.parametrize('colour', [False, True])
@torch.no_grad()
def test_imagenet_stem_is_folded(colour):
    "Five equal frames give what the RGB stem gives for one: for grey ones, and with `colour` for any."
    state = ResNet50(width=.125).state_dict()
    net, rgb = AVSyncNet(.125, 32), ResNet50(width=.125)
    rgb.load_state_dict(state)
    before = {key: value.clone() for key, value in net.face_encoder.fc.state_dict().items()}
    net.load_imagenet(state, colour)
    image = torch.rand(1, 3 if colour else 1, 96, 96, generator=seeded()).expand(1, 3, 96, 96)
    normal = (image - net.mean)/net.deviation if colour else image
    stacked = normal.flip(1).repeat(1, 5, 1, 1)
    torch.testing.assert_close(net.face_encoder.conv1(stacked), rgb.conv1(normal), atol=1e-5, rtol=1e-4)
    loaded = net.face_encoder.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items() if not key.startswith(('fc.', 'conv1.')))
    assert all(torch.equal(loaded[f'fc.{key}'], value) for key, value in before.items())


def test_imagenet_of_another_network_is_refused():
    net = AVSyncNet(.125, 32)
    for state in ({}, AVSyncNet(.125, 32).face_encoder.state_dict()):
        with pytest.raises(InputError, match="torchvision's resnet50"): net.load_imagenet(state)


@torch.no_grad()
def test_avsyncnet_sees_what_the_plain_path_gives():
    "uint8 crops by indexing, scaling and normalising in NumPy order against the differentiable path."
    net = AVSyncNet(.125, 32).eval()
    faces = torch.randint(256, (6, 3, 224, 224), generator=seeded(), dtype=torch.uint8)
    mean, deviation = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    frames = [((f.permute(1, 2, 0)/255 - mean)/deviation)[112:, :, [2, 1, 0]] for f in faces]
    windows = torch.stack([torch.cat(frames[i:i + 5], -1).permute(2, 0, 1) for i in range(2)])
    torch.testing.assert_close(net.raw_video(faces[None].float()/255)[0], net.encode_faces(windows), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('size', [96, 160, 300])
@torch.no_grad()
def test_crops_are_resized_as_cv2_does(size):
    "Bilinear, pixel centres at halves; larger crops are averaged first and are only close."
    cv2 = pytest.importorskip('cv2')
    smooth = cv2.GaussianBlur(torch.rand(size, size, 3, generator=seeded()).numpy(), (0, 0), size/30)
    want = torch.from_numpy(cv2.resize(smooth, (224, 224), interpolation=cv2.INTER_LINEAR))
    faces = torch.from_numpy(smooth).permute(2, 0, 1).expand(1, 5, 3, size, size)
    got = SyncNetV2(.125, 32).frames(faces)[0, :, 2]
    torch.testing.assert_close(got, 255*want.permute(2, 0, 1).flip(0), atol=.01 if size < 224 else .6, rtol=0)
    window = AVSyncNet(.125, 32, size=224)
    got = (window.video_windows(faces)[0, 0, 6:9].flip(0)*window.deviation + window.mean)
    torch.testing.assert_close(got, want.permute(2, 0, 1)[:, 112:], atol=1e-4 if size < 224 else 3e-3, rtol=0)


def test_input_paths_pass_gradcheck():
    "From the pixels of a small crop through resize, colour order, range, windows and network, in double precision."
    torch.manual_seed(0)
    for net in (SyncNet(.125), LightSyncNet(8, 4), AVSyncNet(.125, 4, size=32), AVSyncNet(.125, 4), SyncNetV2(.05, 4)):
        net = frozen(net.double())
        faces = torch.rand(1, 6, 3, 12, 12, dtype=torch.double, generator=seeded()).requires_grad_()
        assert torch.autograd.gradcheck(net.raw_video, faces, fast_mode=True, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('make', [lambda: ResNetSE34L(16, .5), lambda: ResNetSE34V2(16, .25, mels=40)])
@torch.no_grad()
def test_resnetse34_does_not_see_the_gain(make):
    "`power=True` takes log and instance norm: a louder recording gives the same embedding; without it, levels count."
    net, power = make().eval(), torch.rand(2, 40, 60, generator=seeded()) + 1
    torch.testing.assert_close(net(50*power, power=True), net(power, power=True), atol=1e-4, rtol=1e-3)
    assert (net(power) - net(power + 1)).abs().max() > 1e-3


@pytest.mark.parametrize('audio', ['L', 'V2'])
def test_avsyncnet_learns(audio):
    "Both encoders follow: one batch is told apart within a few steps."
    torch.manual_seed(0)
    net = AVSyncNet(.125, 32, audio, size=32).train()
    faces, mel = torch.rand(8, 5, 3, 32, 32, generator=seeded()), torch.randn(8, 80, 16, generator=seeded())
    optimiser, course = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(25):
        v, a = net(faces, mel)
        loss = nn.functional.cross_entropy(10*v[:, 0] @ a[:, 0].T, torch.arange(8))
        optimiser.zero_grad(); loss.backward(); optimiser.step(); course.append(loss.item())
    assert course[-1] < .5*course[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


# ---- SyncNetV2

def test_v2_loads_a_file_without_counters():
    "PyTorch of 2017 wrote no num_batches_tracked."
    state = {k: v for k, v in SyncNetV2(.125, 32).state_dict().items() if not k.endswith('num_batches_tracked')}
    SyncNetV2(.125, 32).load_state_dict(state, strict=True)


@pytest.mark.parametrize('frames', [6, 7, 29])
@torch.no_grad()
def test_v2_scores_as_many_positions_as_the_published_script(frames):
    net = SyncNetV2(.05, 8).eval()
    wav = torch.randn(640*frames, generator=seeded())*.1
    v, a = embed_clip(net, torch.zeros(frames, 3, 8, 8, dtype=torch.uint8), wav)
    assert v.shape == a.shape == (frames - 5, 8) and net.tail == 1
    assert net.raw_video(torch.zeros(1, frames, 3, 8, 8)).shape == (1, frames - 4, 8)


def test_v2_windows_of_sound():
    "Frame f has columns 4f..4f+19 of the cepstra of the 16-bit samples."
    net, wav = SyncNetV2(.125, 32), torch.randn(1, 640*9, generator=seeded())*.1
    features = net.audio_features(wav)
    assert features.shape == (1, 13, 4*9 - 1)
    torch.testing.assert_close(features[0], torch.from_numpy(mfcc(wav[0].numpy())).float())
    for f, window in enumerate(net.audio_windows(features)[0]): assert torch.equal(window[0], features[0, :, 4*f:4*f + 20])
    samples = (wav*32768).round().clamp(-32768, 32767).to(torch.int16)
    assert torch.equal(net.audio_features(samples), features)


@torch.no_grad()
def test_v2_dense_every_and_single_agree():
    torch.manual_seed(0)
    net = SyncNetV2(.125, 32).eval()
    faces = torch.rand(2, 9, 3, 224, 224, generator=seeded())
    dense = net.raw_video(faces)
    bgr = (faces*255).flip(2)
    single = torch.stack([net.encode_faces(bgr[:, i:i + 5].transpose(1, 2)) for i in range(5)], 1)
    torch.testing.assert_close(dense, single, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.raw_video(faces, every=2), dense[:, ::2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.embed_video(faces), unit_length(dense))


@pytest.mark.parametrize('faces', [torch.zeros(1, 4, 3, 9, 9), torch.zeros(5, 3, 9, 9), torch.zeros(1, 5, 1, 9, 9)])
def test_bad_faces_of_the_larger_experts(faces):
    for net in (SyncNetV2(.05, 8), AVSyncNet(.125, 8, size=32)):
        with pytest.raises(InputError): net.embed_video(faces)


# ---- along a clip

@torch.no_grad()
def test_chunks_and_dtypes_agree():
    net = LightSyncNet(8, 16).eval()
    faces = torch.randint(256, (30, 3, 96, 96), generator=seeded(), dtype=torch.uint8)
    wav = torch.randn(30*640, generator=seeded())*.1
    whole = similarity_curve(net, faces, wav)
    net.chunk = 4
    torch.testing.assert_close(similarity_curve(net, faces, wav), whole, atol=1e-5, rtol=1e-4)
    mapped = faces.numpy().view()
    mapped.flags.writeable = False                          # as a memory-mapped store gives them
    for given in ((faces.float()/255, net.audio_features(wav[None])[0]), (mapped, wav.numpy())):
        torch.testing.assert_close(similarity_curve(net, *given), whole, atol=1e-5, rtol=1e-4)


def test_embed_clip_leaves_a_training_expert_as_it_was():
    net, clip = LightSyncNet(8, 16).train(), (torch.rand(9, 3, 96, 96, generator=seeded()), torch.zeros(9*640))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    first = similarity_curve(net, *clip)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(first, similarity_curve(net.eval(), *clip))


def test_offset_sign_closed_form():
    "If the sound of frame i is heard at i + k, the peak is at +k (late audio is positive)."
    v = unit_length(torch.randn(40, 8, generator=seeded()))
    for k in (-7, 0, 4, 15):
        scores = offset_scores(v, v.roll(k, 0))
        assert scores.shape == (31,) and best_offset(scores) == k
        torch.testing.assert_close(scores[15 + k], torch.tensor(1.))
    batch = offset_scores(torch.stack([v, v]), torch.stack([v.roll(2, 0), v.roll(-2, 0)]))
    assert best_offset(batch).tolist() == [2, -2]


def test_offset_is_the_mean_over_the_overlap():
    v, a = torch.randn(12, 3, generator=seeded()), torch.randn(12, 3, generator=seeded(1))
    scores = offset_scores(v, a, max_offset=5)
    for k in range(-5, 6):
        terms = [v[i] @ a[i + k] for i in range(12) if 0 <= i + k < 12]
        torch.testing.assert_close(scores[5 + k], torch.stack(terms).mean())


@pytest.mark.parametrize('n, m', [(15, 15), (0, 0)])
def test_offset_needs_positions(n, m):
    with pytest.raises(InputError, match='longer clip'): offset_scores(torch.zeros(n, 4), torch.zeros(n, 4), m)


class Loudness(WindowExpert):
    "Brightness of five frames against the level of their sound: in sync by construction, without training."
    config = dict(name='loudness')
    def encode_faces(self, windows): x = windows.unflatten(1, (5, 3)).mean((2, 3, 4)); return x - x.mean(1, keepdim=True)
    def encode_mel(self, mels): x = nn.functional.adaptive_avg_pool1d(mels.mean(2), 5)[:, 0]; return x - x.mean(1, keepdim=True)


@pytest.mark.parametrize('delay', [-6, 0, 3, 11])
def test_delayed_sound_of_a_real_waveform_has_a_positive_offset(delay):
    level = torch.randint(1, 10, (70,), generator=seeded())/10
    wav = torch.randn(70*640, generator=seeded(1))*.2*(10**(level - 1)).repeat_interleave(640)
    if delay > 0: wav = torch.cat([torch.zeros(delay*640), wav[:-delay*640]])
    if delay < 0: wav = torch.cat([wav[-delay*640:], torch.zeros(-delay*640)])
    faces = level.view(-1, 1, 1, 1).expand(-1, 3, 96, 96)
    assert best_offset(offset_scores(*embed_clip(Loudness(), faces, wav))) == delay


# ---- gradients and precision

def test_frozen_expert_passes_gradients_and_keeps_its_statistics():
    net = LightSyncNet(8, 16).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert frozen(net) is net and not net.training
    faces = torch.rand(2, 6, 3, 96, 96, generator=seeded()).requires_grad_()
    v, a = net(faces, torch.randn(2, 80, 19, generator=seeded()))
    net.similarity(v, a).sum().backward()
    assert faces.grad[..., 48:, :].abs().sum() > 0 and faces.grad[..., :48, :].abs().sum() == 0
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_gradient_reaches_the_wav():
    net, wav = LightSyncNet(8, 16).eval(), (torch.randn(1, 6*640, generator=seeded())*.1).requires_grad_()
    net.embed_audio(net.audio_features(wav))[..., 0].sum().backward()
    assert torch.isfinite(wav.grad).all() and wav.grad.abs().sum() > 0


@pytest.mark.parametrize('make', NETS)
def test_bf16_autocast_and_channels_last(make):
    net = make().eval().to(memory_format=torch.channels_last)
    faces, mel = torch.rand(2, 7, 3, 96, 96, generator=seeded()), torch.randn(2, 80, 22, generator=seeded())
    with torch.no_grad():
        exact = net.similarity(*net(faces, mel))
        with torch.autocast('cpu', torch.bfloat16): rough = net.similarity(*net(faces, mel))
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < .03


def test_light_net_learns_in_bf16():
    "One batch is told apart by InfoNCE within a few steps, in the setting of the CPU profiles."
    torch.manual_seed(0)
    net = LightSyncNet(8, 32).train().to(memory_format=torch.channels_last)
    faces, mel = torch.rand(8, 5, 3, 96, 96, generator=seeded()), torch.randn(8, 80, 16, generator=seeded())
    optimiser, course = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(15):
        with torch.autocast('cpu', torch.bfloat16): v, a = net(faces, mel)
        loss = nn.functional.cross_entropy(10*v[:, 0] @ a[:, 0].T, torch.arange(8))
        optimiser.zero_grad(); loss.backward(); optimiser.step(); course.append(loss.item())
    assert course[-1] < .5*course[0]


def test_zero_embedding_is_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    unit_length(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_interface_without_an_implementation():
    with pytest.raises(NotImplementedError): SyncExpert().embed_video(torch.zeros(1, 5, 3, 96, 96))


# ---- layers

@pytest.mark.parametrize('size', [32, 48, 96, 112, 160, 256])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_zero_flow_is_exactly_the_identity(size, dtype):
    image = torch.rand(1, 3, size, size, generator=seeded()).to(dtype)
    assert torch.equal(warp(image, torch.zeros(1, 2, size, size)).to(dtype), image)


def test_whole_pixel_flow_is_exact_and_repeats_the_border():
    image, flow = torch.rand(1, 2, 20, 30, generator=seeded()), torch.zeros(1, 2, 20, 30)
    flow[:, 0], flow[:, 1] = 3, -2
    rows, columns = (torch.arange(20) - 2).clamp(0), (torch.arange(30) + 3).clamp(max=29)
    assert torch.equal(warp(image, flow), image[:, :, rows][..., columns])


def test_warp_under_autocast():
    image = torch.rand(1, 3, 96, 96, generator=seeded())
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(warp(image, torch.zeros(1, 2, 96, 96)), image)


def test_film_gradcheck():
    film = FiLM(3, 2).double()
    nn.init.normal_(film.to_scale_shift.weight)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.double, generator=seeded()).requires_grad_()
    assert torch.autograd.gradcheck(film, (draw(2, 2, 3, 3), draw(2, 3)))


def test_lower_half_of_a_flat_face_stays_flat_at_any_size():
    for size in (48, 96, 128):
        torch.testing.assert_close(lower_half_bgr(torch.full((1, 3, size, size), .3)), torch.full((1, 3, 48, 96), .3))


# ---- mouth landmarks

@torch.no_grad()
def test_landmarker_brightness_contrast_tint():
    net = LipLandmarker(8).eval()
    faces = torch.rand(3, 3, 96, 96, generator=seeded())
    points = net(faces)
    tint = torch.tensor([.1, 0., -.05]).view(1, 3, 1, 1)
    for changed in (faces*.6, faces + .2, faces*.5 + .3 + tint): assert (net(changed) - points).norm(dim=-1).max() < .1


def test_landmarker_starts_near_its_mean_shape_and_keeps_it():
    mean = mouth_shape() + torch.tensor([1.5, -2.])
    net = LipLandmarker(8, mean_shape=mean).eval()
    with torch.no_grad(): assert (net(torch.rand(4, 3, 96, 96, generator=seeded())) - mean).norm(dim=-1).max() < 4
    assert torch.equal(net.state_dict()['mean_shape'], mean)
    with torch.autocast('cpu', torch.bfloat16): assert net(torch.rand(1, 3, 96, 96)).dtype == torch.float32


def test_landmarker_refuses_other_shapes():
    with pytest.raises(InputError, match=r'expected faces \(N, 3'): LipLandmarker(8)(torch.zeros(1, 5, 3, 96, 96))


# ---- light imports

def test_imports_with_torch_and_numpy_alone():
    "A training machine has neither decoders nor tables nor plots."
    blocked = ('av', 'cv2', 'librosa', 'pandas', 'skimage', 'scipy', 'matplotlib', 'fastcore', 'torchvision')
    code = f"""
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}: raise ImportError(f'{{name}} was imported')
sys.meta_path.insert(0, Wall())
import talkingface.experts.syncnet, talkingface.experts.avsyncnet, talkingface.experts.landmarks, talkingface.losses.sync
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- what embed_clip takes ----

@pytest.mark.parametrize('make', [lambda: LightSyncNet(8, 16), lambda: AVSyncNet(.0625, 16, size=32)])
def test_types_of_numpy_and_scipy_are_taken(make):
    net = make().train(); faces, wav = torch.rand(7, 3, 96, 96, generator=seeded()), torch.randn(7*640, generator=seeded())*.1
    pcm = (wav*32768).short(); want = embed_clip(net, faces, pcm.float()/32768)
    for given in ((faces.double().numpy(), pcm.numpy()), (faces.tolist(), (pcm.double()/32768).tolist())):
        for x, y in zip(embed_clip(net, *given), want): torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert [x.dtype for x in net.double().raw_video(faces[None].double())[:1]] == [torch.float64] and embed_clip(net, faces, wav)[0].shape[0] == 3


@pytest.mark.parametrize('change, words', [
    (dict(faces=torch.full((7, 3, 96, 96), 254.)), 'divide them by 255'), (dict(faces=torch.full((7, 3, 96, 96), float('nan'))), 'got values from nan'),
    (dict(audio=torch.zeros(2, 4480)), 'expected one channel'), (dict(audio=torch.zeros(4480, 2)), 'expected one channel'),
    (dict(audio=torch.full((4480,), float('nan'))), 'NaN'), (dict(audio=torch.zeros(4480, dtype=torch.int64)), 'int16'),
    (dict(audio=torch.zeros(26, 30)), r'expected a mel \(B, 80, M\)'), (dict(every=0), '1 or more'), (dict(every=-1), '1 or more')])
def test_unusable_clips_are_refused_and_the_mode_stays(change, words):
    net = LightSyncNet(8, 16).train(); clip = dict(faces=torch.rand(7, 3, 96, 96), audio=torch.zeros(4480))
    with pytest.raises(InputError, match=words): embed_clip(net, **{**clip, **change})
    assert net.training


@pytest.mark.parametrize('samples, positions', [(6399, 4), (6400, 5), (6500, 5), (6720, 5), (7040, 5), (5760, 4)])
def test_syncnet_v2_counts_positions_as_published(samples, positions):
    "min(frames, whole frames of sound) - 5, whatever the length of the sound."
    expert = SyncNetV2(width=.125, dim=16).eval()
    v, a = embed_clip(expert, torch.rand(10, 3, 64, 64), .1*torch.randn(samples), raw=True)
    assert len(v) == len(a) == positions
