"""Generators: the contract at several sizes, what a batch may show, frozen parts, what the light one keeps, and bad input."""
import numpy as np
import pytest
import torch
from torch import nn

from talkingface.core import InputError, ParamsError
from talkingface.generators.base import GENERATORS, GeneratorBatch, build_generator, check_generator, generator_class, make_batch, random_batch
from talkingface.generators.light import LightGenerator, close_seam, fold
from talkingface.generators.lipsync import FaceEncoder, LipSync

torch.set_num_threads(1)
SMALL = {'lipsync': {'width': .125}, 'light': {'width': 8}}


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('size', [96, 128])
def test_every_generator_meets_the_contract(name, size):
    check_generator(build_generator({'name': name, 'size': size, **SMALL[name]}))


def test_every_registered_generator_is_checked_here(): assert set(SMALL) == set(GENERATORS)


@pytest.mark.parametrize('name', SMALL)
def test_a_generator_is_rebuilt_from_its_config_and_loads_its_weights(name):
    first = build_generator({'name': name, **SMALL[name]}).eval()
    again = build_generator(first.config).eval()
    again.load_state_dict(first.state_dict(), strict=True)
    batch = random_batch(groups=1, frames=2)
    with torch.no_grad(): assert torch.equal(first(batch), again(batch))


@pytest.mark.parametrize('name', SMALL)
def test_the_hidden_half_of_the_target_changes_nothing(name):
    generator = build_generator({'name': name, **SMALL[name]}).eval()
    raw = dict(faces=torch.rand(1, 2, 3, 96, 96), reference=torch.rand(1, 2, 3, 96, 96), mel=torch.randn(1, 2, 80, 16))
    other = dict(raw, faces=torch.cat([raw['faces'][..., :48, :], torch.rand(1, 2, 3, 48, 96)], -2))
    with torch.no_grad(): assert torch.equal(generator(make_batch(raw)), generator(make_batch(other)))


@pytest.mark.parametrize('name', SMALL)
def test_frames_of_a_group_do_not_depend_on_each_other_in_eval_mode(name):
    generator = build_generator({'name': name, **SMALL[name]}).eval()
    batch = random_batch(groups=1, frames=4)
    single = GeneratorBatch(masked=batch.masked[:, 2:3], reference=batch.reference[:, 2:3], mel=batch.mel[:, 2:3])
    with torch.no_grad(): assert torch.allclose(generator(batch)[:, 2:3], generator(single), atol=1e-5)


@pytest.mark.parametrize('name', SMALL)
def test_bf16_autocast_stays_near_fp32(name):
    generator = build_generator({'name': name, **SMALL[name]}).eval()
    batch = random_batch(groups=1, frames=2)
    with torch.no_grad():
        full = generator(batch)
        with torch.autocast('cpu', torch.bfloat16): half = generator(batch)
    assert (full - half.float()).abs().mean() < .02


@pytest.mark.parametrize('name', SMALL)
def test_a_frozen_audio_encoder_neither_learns_nor_drifts(name):
    audio = nn.Sequential(nn.Flatten(), nn.Linear(1280, 16), nn.BatchNorm1d(16))
    generator = build_generator({'name': name, 'audio_size': 16, 'freeze_audio': True, **SMALL[name]}, audio_encoder=audio)
    before = {k: v.clone() for k, v in audio.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in generator.parameters() if p.requires_grad], .1)
    for _ in range(2):
        optimiser.zero_grad(); generator.train()(random_batch(frames=2)).mean().backward(); optimiser.step()
    assert all(torch.equal(v, before[k]) for k, v in audio.state_dict().items())
    with pytest.raises(ParamsError, match='go together'): build_generator({'name': name, 'audio_size': 16})


# ---- the base model's layout --------------------------------------------------------------------------------------------
def test_base_model_has_the_published_scales_and_two_separate_face_encoders():
    network = LipSync(width=.125)
    shared = {id(p) for p in network.identity_encoder.parameters()} & {id(p) for p in network.pose_encoder.parameters()}
    assert not shared
    maps = FaceEncoder(width=1).eval()(torch.zeros(1, 3, 96, 96))
    assert [(m.shape[1], m.shape[2]) for m in maps] == [(16, 96), (32, 48), (64, 24), (128, 12), (256, 6), (512, 3), (512, 1)]


# ---- the light generator ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('training', [True, False])
def test_light_keeps_the_visible_half_bit_for_bit(training):
    batch = random_batch(frames=2)
    drawn = LightGenerator(width=8).train(training)(batch)
    assert torch.equal(drawn[..., :48, :], batch.target[..., :48, :])


def test_light_joins_the_halves_without_a_step_in_colour():
    faces = torch.full((1, 1, 3, 96, 96), .8)
    batch = make_batch(dict(faces=faces, reference=faces*.5, mel=torch.zeros(1, 1, 80, 16)))
    with torch.no_grad(): drawn = LightGenerator(width=8).eval()(batch)
    assert (drawn[..., 48, :] - drawn[..., 47, :]).abs().mean() < .01 < (drawn[..., 60, :] - drawn[..., 47, :]).abs().mean()


def test_light_cannot_move_pixels_further_than_its_reach():
    network = LightGenerator(width=8, reach=.1)
    network.paint.bias.data.fill_(1e4)
    flow = network._layers(torch.rand(1, 3, 96, 96), torch.rand(1, 8, 24, 48), torch.rand(1, 128))['flow']
    assert flow.abs().max() <= .1*96 + 1e-4


def test_folding_puts_the_seam_at_row_0():
    masked, reference = torch.rand(2, 3, 96, 96), torch.rand(2, 3, 96, 96)
    folded = fold(masked, reference)
    assert folded.shape == (2, 9, 48, 96)
    assert torch.equal(folded[:, 0:3, 0], masked[:, :, 47]) and torch.equal(folded[:, 6:9, 0], reference[:, :, 48])


def test_closing_a_seam_that_is_closed_changes_nothing():
    painted = torch.rand(1, 3, 1, 1).expand(1, 3, 48, 96)
    assert torch.allclose(close_seam(painted, painted[:, :, :1], 9), painted, atol=1e-6)


# ---- batches ------------------------------------------------------------------------------------------------------------
def test_arrays_and_tensors_and_bytes_and_floats_give_one_batch():
    raw = dict(faces=np.random.default_rng(0).integers(0, 256, (1, 5, 3, 96, 96), dtype=np.uint8), valid=np.ones((1, 5), bool))
    a = make_batch(raw)
    b = make_batch({'faces': torch.from_numpy(raw['faces']).float()/255, 'valid': torch.ones(1, 5)})
    assert torch.equal(a.target, b.target) and torch.equal(a.masked, b.masked) and torch.equal(a.valid, b.valid)
    assert a.to('cpu').target.dtype == torch.float32 and len(a[:0]) == 0


@pytest.mark.filterwarnings('error')
def test_read_only_arrays_are_copied():
    faces = np.zeros((1, 1, 3, 96, 96), np.uint8)
    faces.flags.writeable = False
    assert make_batch(dict(faces=faces)).target.sum() == 0


@pytest.mark.parametrize('change,message', [
    (dict(mel=np.zeros((1, 5, 16, 80), np.float32)), 'mel: expected shape'),
    (dict(mel=np.zeros((1, 4, 80, 16), np.float32)), 'where T is 5'),
    (dict(reference=np.zeros((1, 5, 3, 64, 64), np.uint8)), 'where H is 96'),
    (dict(faces=np.zeros((1, 5, 96, 96, 3), np.uint8)), 'target: expected shape'),
    (dict(faces=np.zeros((1, 5, 3, 95, 95), np.uint8), reference=None), 'even size'),
    (dict(faces=np.zeros((1, 5, 3, 96, 96), np.int64)), 'uint8 or float')])
def test_a_wrong_batch_is_refused_with_its_shapes(change, message):
    raw = dict(faces=np.zeros((1, 5, 3, 96, 96), np.uint8), reference=np.zeros((1, 5, 3, 96, 96), np.uint8)) | change
    with pytest.raises(InputError, match=message): make_batch({k: v for k, v in raw.items() if v is not None})


def test_a_batch_of_another_resolution_is_refused():
    with pytest.raises(InputError, match='draws 96 px faces, the batch has 128 px'): LightGenerator(width=8)(random_batch(128, 1, 1))


@pytest.mark.parametrize('config,message', [({'name': 'lihgt'}, "did you mean 'light'"), ({'name': 'light', 'widht': 8}, "did you mean 'width'"),
                                            ({'width': 8}, 'expected a `name`'), ({'name': 'light', 'size': 90}, 'multiple of 32')])
def test_a_wrong_configuration_is_refused(config, message):
    with pytest.raises(ParamsError, match=message): build_generator(config)


def test_registry_names_resolve(): assert generator_class('light') is LightGenerator and generator_class('lipsync') is LipSync
