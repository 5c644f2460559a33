"""Generators: the contract at several sizes, what a batch may show, frozen parts, what the light one keeps, and bad input."""
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from talkingface.core import InputError, ParamsError
from talkingface.experts.checkpoints import build_expert
from talkingface.generators.base import (GENERATORS, ExpertAudio, Generator, GeneratorBatch, build_generator, check_generator,
                                         draw_clip, generator_class, make_batch, random_batch)
from talkingface.generators.light import LightGenerator, close_seam, fold, spread
from talkingface.generators.lipsync import FaceEncoder, LipSync
from talkingface.generators.references import LowestSimilarity, Silencer, check_silencer
from talkingface.weights import load_model, save_model

torch.set_num_threads(1)
SMALL = {'lipsync': {'width': .125}, 'light': {'width': 8}, 'wav2lip': {'width': .125}, 'dinet': {'width': .125, 'scale': .25},
         'g4g': {'width': .25, 'scale': .25, 'size': 96}}
TOWERS = {'syncnet': {'name': 'syncnet', 'width': .125}, 'light_syncnet': {'name': 'light_syncnet', 'width': 8, 'dim': 16},
          'avsyncnet': {'name': 'avsyncnet', 'width': .125, 'dim': 32, 'size': 32},
          'avsyncnet V2': {'name': 'avsyncnet', 'width': .125, 'dim': 32, 'size': 32, 'audio': 'V2'}}
LISTENERS = ['lipsync', 'light']      # generators that take `audio`


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('size', [96, 128])
def test_every_generator_meets_the_contract(name, size):
    check_generator(build_generator({'name': name, **SMALL[name], 'size': size}))


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
    raw = dict(faces=torch.rand(1, 2, 3, 96, 96), reference=torch.rand(1, 2, 3, 96, 96), mel=torch.randn(1, 2, 80, 16),
               landmarks=torch.rand(1, 2, 68, 2)*96, stills=torch.rand(1, 5, 3, 96, 96), still_landmarks=torch.rand(1, 5, 68, 2)*96)
    other = dict(raw, faces=torch.cat([raw['faces'][..., :48, :], torch.rand(1, 2, 3, 48, 96)], -2), landmarks=torch.rand(1, 2, 68, 2)*96)
    with torch.no_grad(): assert torch.equal(generator(make_batch(raw)), generator(make_batch(other)))


@pytest.mark.parametrize('name', SMALL)
def test_frames_of_a_group_do_not_depend_on_each_other_in_eval_mode(name):
    generator = build_generator({'name': name, **SMALL[name]}).eval()
    batch = random_batch(groups=1, frames=4)
    single = GeneratorBatch(masked=batch.masked[:, 2:3], reference=batch.reference[:, 2:3], mel=batch.mel[:, 2:3],
                            stills=batch.stills, still_landmarks=batch.still_landmarks)
    with torch.no_grad(): assert torch.allclose(generator(batch)[:, 2:3], generator(single), atol=1e-5)


@pytest.mark.parametrize('name', SMALL)
def test_bf16_autocast_stays_near_fp32(name):
    generator = build_generator({'name': name, **SMALL[name]}).eval()
    batch = random_batch(groups=1, frames=2)
    with torch.no_grad():
        full = generator(batch)
        with torch.autocast('cpu', torch.bfloat16): half = generator(batch)
    assert (full - half.float()).abs().mean() < .02


# ---- what a generator hears with ----------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', LISTENERS)
@pytest.mark.parametrize('tower', TOWERS)
def test_every_generator_takes_the_tower_of_every_expert_on_mel(name, tower):
    expert = build_expert(TOWERS[tower])
    check_generator(build_generator({'name': name, **SMALL[name], 'audio': TOWERS[tower]}).load_audio(expert))


@pytest.mark.parametrize('name', LISTENERS)
@pytest.mark.parametrize('audio', [{'name': 'wav2vec2'}, {'name': 'wav2vec2', 'frames': 4, 'dim': 6}])
def test_every_generator_takes_speech_features(name, audio):
    generator = build_generator({'name': name, **SMALL[name], 'audio': audio})
    assert generator.needs == ('masked', 'reference', 'speech'); check_generator(generator)
    silent = GeneratorBatch(**{k: v for k, v in random_batch().present().items() if k != 'speech'})
    with pytest.raises(InputError, match='needs speech'): generator(silent)
    assert type(generator).needs == ('masked', 'reference', 'mel'), 'one generator changed the needs of its class'


@pytest.mark.parametrize('tower', TOWERS)
def test_a_tower_is_the_expert_before_unit_length_without_its_face(tower):
    expert = build_expert(TOWERS[tower]).eval(); audio = ExpertAudio(TOWERS[tower]); audio.load(expert)
    mel = torch.randn(3, 1, 80, 16)
    with torch.no_grad(): torch.testing.assert_close(audio(mel), expert.encode_mel(mel), atol=1e-6, rtol=1e-5)
    assert audio.size == audio(mel).shape[1]
    assert not any('face' in k for k in audio.state_dict()) and not hasattr(audio.tower, 'mel')
    assert not any(p.requires_grad for p in audio.parameters())


@pytest.mark.parametrize('name', LISTENERS)
@pytest.mark.parametrize('tower', ['syncnet', 'avsyncnet'])
def test_a_frozen_tower_neither_learns_nor_drifts(name, tower):
    expert = build_expert(TOWERS[tower])
    generator = build_generator({'name': name, **SMALL[name], 'audio': expert.config}).load_audio(expert)
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in generator.parameters() if p.requires_grad], .1)
    for _ in range(2):
        optimiser.zero_grad(); generator.train()(random_batch(frames=2)).mean().backward(); optimiser.step()
    moved = {k for k, v in generator.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(k.startswith('audio_encoder') for k in moved) and any(k.startswith('audio_projection') for k in moved)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', LISTENERS)
def test_a_saved_generator_needs_no_expert(tmp_path, name):
    "Its folder holds the tower and a plain config; the expert's folder may be gone."
    expert = build_expert(TOWERS['syncnet'])
    generator = build_generator({'name': name, **SMALL[name], 'audio': TOWERS['syncnet']}).load_audio(expert).eval()
    loaded = load_model(save_model(tmp_path, generator, {}), build_generator); batch = random_batch(96, 1, 2)
    with torch.no_grad(): assert torch.equal(loaded(batch), generator(batch))
    assert loaded.config == generator.config and not any(p.requires_grad for p in loaded.audio_encoder.parameters())


def test_a_tower_with_fresh_weights_is_not_used_in_silence():
    generator = build_generator({'name': 'light', 'width': 8, 'audio': TOWERS['syncnet']})
    with pytest.warns(UserWarning, match='fresh weights .*load_audio'): generator.eval()(random_batch(96, 1, 1))


def test_the_tower_of_another_expert_is_refused():
    generator = build_generator({'name': 'light', 'width': 8, 'audio': TOWERS['syncnet']})
    for other in (TOWERS['avsyncnet'], {'name': 'syncnet', 'width': .25}, {'name': 'syncnet', 'width': .125, 'relu': False}):
        with pytest.raises(InputError, match='audio=expert.config'): generator.load_audio(build_expert(other))
    with pytest.raises(InputError, match='no place for the audio tower'): LightGenerator(width=8).load_audio(build_expert(TOWERS['syncnet']))


@pytest.mark.parametrize('audio, message', [
    ({'name': 'syncnett'}, "did you mean 'syncnet'"), ({'name': 'syncnet', 'widht': 1.}, "did you mean 'width'"), ({'width': .25}, 'expert'),
    ({'name': 'wav2vec2', 'frame': 9}, "did you mean 'frames'"), ({'name': 'syncnet_v2', 'width': .125}, 'does not hear mel windows'),
    ({'name': 'avhubert', 'net': {'dim': 16, 'layers': 1, 'heads': 1, 'ffn': 16, 'front_width': .0625}}, 'does not hear mel windows')])
def test_an_audio_that_cannot_be_built_is_refused(audio, message):
    with pytest.raises(ParamsError, match=message): build_generator({'name': 'light', 'width': 8, 'audio': audio})


def test_a_clip_is_drawn_from_speech_features():
    generator = LightGenerator(width=8, audio={'name': 'wav2vec2', 'frames': 4, 'dim': 6})
    faces = np.zeros((5, 3, 96, 96), np.uint8); speech = np.random.default_rng(0).normal(size=(5, 4, 6)).astype(np.float32)
    drawn, at_once = draw_clip(generator, faces, faces, None, 2, speech), draw_clip(generator, faces, faces, np.zeros((5, 80, 16)), speech=speech)
    assert drawn.shape == (5, 3, 96, 96) and torch.allclose(drawn, at_once, atol=1e-5)


# ---- the base model's layout --------------------------------------------------------------------------------------------
def test_the_size_of_a_face_is_checked_before_anything_is_built():
    for name in ('lipsync', 'light', 'wav2lip'):              # the others resize to a crop of their own
        with pytest.raises(ParamsError, match='multiple of 32'): build_generator({'name': name, **SMALL[name], 'size': 90})


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


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_spreading_is_a_pixel_shuffle_forwards_and_backwards(dtype):
    maps = torch.randn(2, 12, 3, 5, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_(); slope = torch.randn(2, 3, 6, 10)
    wanted = torch.nn.functional.pixel_shuffle(maps.float(), 2)
    assert torch.equal(spread(maps), wanted)
    assert torch.equal(*(torch.autograd.grad(x, maps, slope)[0] for x in (spread(maps), wanted)))


def test_folding_puts_the_seam_at_row_0():
    masked, reference = torch.rand(2, 3, 96, 96), torch.rand(2, 3, 96, 96)
    folded = fold(masked, reference)
    assert folded.shape == (2, 9, 48, 96)
    assert torch.equal(folded[:, 0:3, 0], masked[:, :, 47]) and torch.equal(folded[:, 6:9, 0], reference[:, :, 48])


def test_closing_a_seam_that_is_closed_changes_nothing():
    painted = torch.rand(1, 3, 1, 1).expand(1, 3, 48, 96)
    assert torch.allclose(close_seam(painted, painted[:, :, :1], 9), painted, atol=1e-6)


# ---- stills -------------------------------------------------------------------------------------------------------------
class Stills(Generator):
    "Shows the mean of its stills, shifted by the mean of their landmarks."
    needs = ('masked', 'mel', 'stills', 'still_landmarks')
    def __init__(self, size: int = 96, count: int = 3):
        super().__init__('stills', size=size, count=count)
        self.gain, self.side = torch.nn.Parameter(torch.ones(())), torch.nn.Linear(1, 1)
    @property
    def stills(self): return self.config['count']
    def draw(self, batch):
        self.inner = {'where': self.side(batch.still_landmarks.mean((1, 2, 3))[:, None])}
        return (batch.stills.mean(1, keepdim=True)*self.gain).clamp(0, 1).expand_as(batch.masked)


def test_a_generator_with_stills_meets_the_contract():
    "With as many as it says; what only its inner features reach counts as reached."
    check_generator(Stills()); check_generator(Stills(128, 5))
    class Idle(Stills):
        def draw(self, batch): return batch.masked*self.gain.clamp(0, 1)
    with pytest.raises(AssertionError, match='no finite gradient reaches side.weight'): check_generator(Idle())


def test_stills_of_a_batch_agree_with_each_other_and_with_the_generator():
    batch = random_batch(stills=4)
    assert batch.stills.shape == (2, 4, 3, 96, 96) and 0 <= batch.stills.min() and batch.stills.max() <= 1
    assert batch.still_landmarks.shape == (2, 4, 68, 2) and len(batch[:1].stills) == 1
    with pytest.raises(InputError, match='built for 3 stills, the batch has 4'): Stills()(batch)
    with pytest.raises(InputError, match='Stills needs stills, still_landmarks'): Stills()(GeneratorBatch(masked=batch.masked, mel=batch.mel))
    with pytest.raises(InputError, match='still_landmarks: .* where R is 4'): GeneratorBatch(stills=batch.stills, still_landmarks=batch.still_landmarks[:, :3])
    with pytest.raises(InputError, match='stills: .* where H is 96'): GeneratorBatch(masked=batch.masked, stills=batch.stills[..., :64, :64])


def test_the_other_fields_of_noise_do_not_depend_on_stills():
    one, other = random_batch(stills=5), random_batch(stills=2)
    assert all(torch.equal(getattr(one, k), getattr(other, k)) for k in one.present() if 'still' not in k)


def test_a_clip_is_drawn_with_stills_for_all_its_frames_or_for_each():
    draw = np.random.default_rng(0); faces = draw.integers(0, 256, (5, 3, 96, 96), dtype=np.uint8); mels = np.zeros((5, 80, 16), np.float32)
    stills, points = faces[[0, 2, 4]], np.zeros((3, 68, 2), np.float32)
    whole = draw_clip(Stills(), faces, faces, mels, 2, stills=stills, still_landmarks=points)
    assert torch.allclose(whole, torch.from_numpy(stills/255).float().mean(0).expand(5, -1, -1, -1), atol=1e-6)
    each = np.stack([stills, stills//2, stills//3, stills, stills])
    apart = draw_clip(Stills(), faces, faces, mels, 2, stills=each, still_landmarks=np.zeros((5, 3, 68, 2), np.float32))
    assert torch.allclose(apart[[0, 3, 4]], whole[[0, 3, 4]], atol=1e-6) and torch.allclose(apart[1], whole[1]/2, atol=.003)
    with pytest.raises(InputError, match=r'Stills is shown 3 stills .* still_frames\(clip, 3\)'): draw_clip(Stills(), faces, faces, mels)
    with pytest.raises(InputError, match='built for 3 stills, the batch has 2'): draw_clip(Stills(), faces, faces, mels, stills=stills[:2], still_landmarks=points[:2])


def test_stills_and_silencers_do_not_go_together():
    silencer = Silencer(LightGenerator(width=8))
    with pytest.raises(InputError, match='Stills is shown 3 stills of a clip'): Silencer(Stills())
    with pytest.raises(InputError, match='leave the silencer out'): check_silencer(Stills(), silencer)
    check_silencer(Stills(), None); check_silencer(LightGenerator(width=8), silencer)


# ---- the reference that fits the sound least ------------------------------------------------------------------------------
def test_lowest_similarity_leaves_the_window_or_says_that_it_cannot():
    table = np.arange(7, dtype=float)[:, None].repeat(40, 1)                   # the first candidate fits least, then the next
    choose = LowestSimilarity(None, distance=5); choose.table = lambda clip: (np.arange(0, 28, 4), table)
    clip = SimpleNamespace(name='c')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert choose(clip, 0, 5) == 12 and choose(clip, 10, 5) == 0           # of 12, 16, ...; of 0, 4, 20, 24
    choose.table = lambda clip: (np.array([2, 4, 8]), table[:3])
    with pytest.warns(UserWarning, match='clip c: no candidate for a reference is 5 frames from a window; the farthest, 3 frames away'):
        assert choose(clip, 5, 5) == 2                                         # candidates 3, 1 and 0 frames away
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert choose(clip, 1, 4) == 8    # told once for a clip


# ---- batches ------------------------------------------------------------------------------------------------------------
def test_arrays_and_tensors_and_bytes_and_floats_give_one_batch():
    raw = dict(faces=np.random.default_rng(0).integers(0, 256, (1, 5, 3, 96, 96), dtype=np.uint8), valid=np.ones((1, 5), bool))
    a = make_batch(raw)
    b = make_batch({'faces': torch.from_numpy(raw['faces']).float()/255, 'valid': torch.ones(1, 5)})
    assert torch.equal(a.target, b.target) and torch.equal(a.masked, b.masked) and torch.equal(a.valid, b.valid)
    assert a.to('cpu').target.dtype == torch.float32 and len(a[:0]) == 0


def test_the_reference_before_its_mouth_was_closed_is_kept_beside_it():
    faces = np.full((1, 2, 3, 96, 96), 255, np.uint8)
    batch = make_batch(dict(faces=faces, reference=faces//2, raw_reference=faces, speech=np.zeros((1, 2, 10, 768))))
    assert batch.raw_reference.max() == 1 > batch.reference.max() and batch.speech.dtype == torch.float32
    assert make_batch(dict(faces=faces)).raw_reference is None and set(random_batch().present()) >= {'raw_reference', 'speech'}


@pytest.mark.filterwarnings('error')
def test_read_only_arrays_are_copied():
    faces = np.zeros((1, 1, 3, 96, 96), np.uint8)
    faces.flags.writeable = False
    assert make_batch(dict(faces=faces)).target.sum() == 0


@pytest.mark.parametrize('change,message', [
    (dict(mel=np.zeros((1, 5, 16, 80), np.float32)), 'mel: expected shape'),
    (dict(mel=np.zeros((1, 4, 80, 16), np.float32)), 'where T is 5'),
    (dict(reference=np.zeros((1, 5, 3, 64, 64), np.uint8)), 'where H is 96'),
    (dict(raw_reference=np.zeros((1, 5, 3, 64, 64), np.uint8)), 'raw_reference: .* where H is 96'),
    (dict(speech=np.zeros((1, 5, 768), np.float32)), r'speech: expected shape \(B, T, S, C\)'),
    (dict(speech=np.zeros((1, 4, 10, 768), np.float32)), 'speech: .* where T is 5'),
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
