"""Wav2Lip's generator against the published layout, and Wav2Vec2's speech features: files, alignment, what is missing."""
import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from goldens import load_manifest
from test_checkpoints import NESTINGS, generated
from talkingface.core import CheckpointError, InputError, MissingExtra, MissingWeights
from talkingface.data.audio import mel_start
from talkingface.experts.syncnet import SyncNet
from talkingface.generators.base import GeneratorBatch, random_batch
from talkingface.generators.speech import Wav2Vec2Speech, frame_speech, speech_features
from talkingface.generators.wav2lip import Wav2Lip, load_wav2lip


# ---- the published generator --------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def published(): return generated(load_manifest('wav2lip_generator'))


def test_names_and_shapes_are_the_published_ones():
    with torch.device('meta'): own = Wav2Lip().state_dict()
    assert {k: tuple(v.shape) for k, v in own.items()} == load_manifest('wav2lip_generator')


@pytest.mark.parametrize('file', ['wav2lip.pth', 'wav2lip_gan.pth'])
def test_a_published_file_loads_strictly_from_the_weights_folder(tmp_path, monkeypatch, published, file):
    wrapped = {f'module.{k}': v for k, v in published.items()}
    torch.save({'state_dict': wrapped, 'optimizer': None, 'global_step': 7, 'global_epoch': 1}, tmp_path/file)
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    generator = load_wav2lip(); own = generator.state_dict()
    assert own.keys() == published.keys() and all(torch.equal(own[k], published[k]) for k in own)
    assert not generator.training and generator.meta['file'] == file and 'non-commercial' in generator.meta['licence']


@pytest.mark.parametrize('nesting', NESTINGS)
def test_every_nesting_and_width_loads(tmp_path, nesting):
    narrow = Wav2Lip(width=.125).eval()
    torch.save(NESTINGS[nesting](narrow.state_dict()), tmp_path/'file.pth')
    loaded = load_wav2lip(tmp_path/'file.pth'); batch = random_batch(96, 1, 2)
    with torch.no_grad(): assert torch.equal(loaded(batch), narrow(batch))
    assert loaded.config == narrow.config


@pytest.mark.parametrize('change, message', [
    (lambda w: {k: v for k, v in w.items() if k != 'face_decoder_blocks.3.1.conv_block.0.bias'}, 'lacks 1 of .*face_decoder_blocks.3.1'),
    (lambda w: {**w, 'extra.weight': torch.zeros(1)}, 'unexpected keys .*extra.weight'),
    (lambda w: {**w, 'output_block.1.bias': torch.full((3,), torch.nan)}, 'NaN or infinity'),
    (lambda w: SyncNet(width=.125).state_dict(), 'is SyncNet of Wav2Lip, not the generator'),
    (lambda w: {'a': torch.zeros(1)}, 'no architecture that is known here')])
def test_another_file_is_refused_in_words(tmp_path, change, message):
    torch.save(change(Wav2Lip(width=.125).state_dict()), tmp_path/'wav2lip.pth')
    with pytest.raises(CheckpointError, match=message): load_wav2lip(tmp_path/'wav2lip.pth')


def test_missing_weights_name_both_files_and_their_terms(tmp_path, monkeypatch):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(MissingWeights, match=r'wav2lip\.pth or wav2lip_gan\.pth in .*non-commercial') as error: load_wav2lip()
    assert str(tmp_path) in str(error.value)


@torch.no_grad()
def test_the_forward_pass_of_the_published_network(published):
    "Written out once more from the paper's description, on plain tensors: BGR in and out, skips from the deepest map on."
    generator = Wav2Lip().eval(); generator.load_state_dict(published)
    batch = random_batch(96, 1, 2)
    x = torch.cat([batch.masked[0].flip(1), batch.reference[0].flip(1)], 1); maps = []
    for stack in generator.face_encoder_blocks: x = stack(x); maps.append(x)
    x = generator.audio_encoder(batch.mel[0, :, None])
    assert x.shape == (2, 512, 1, 1)
    for stack in generator.face_decoder_blocks: x = torch.cat([stack(x), maps.pop()], 1)
    assert torch.equal(generator(batch)[0], torch.sigmoid(generator.output_block(x)).flip(1)) and not maps


def test_red_and_blue_are_not_interchangeable():
    generator = Wav2Lip(width=.125).eval(); batch = random_batch(96, 1, 1)
    turned = GeneratorBatch(masked=batch.masked.flip(2), reference=batch.reference.flip(2), mel=batch.mel)
    with torch.no_grad(): assert not torch.allclose(generator(batch), generator(turned).flip(2), atol=1e-3)


# ---- speech features ----------------------------------------------------------------------------------------------------
class Stub:
    "A network in the call of transformers that sees 400 samples every 320; counts how much it is given at once."
    longest = 0
    def __call__(self, wav):
        self.longest = max(self.longest, wav.shape[1]); x = wav.unfold(1, 400, 320)
        return SimpleNamespace(last_hidden_state=torch.stack([x.mean(2), x.square().mean(2), x[..., 200]], 2))


NOISE = np.random.default_rng(0).normal(0, .1, 100_000).astype(np.float32)


@pytest.mark.parametrize('samples', [1, 319, 320, 321, 16_000, 100_000])
def test_there_are_fifty_vectors_per_second_at_any_length(samples):
    assert speech_features(Stub(), NOISE[:samples]).shape == (-(-samples//320), 3)


@pytest.mark.parametrize('piece, context', [(.02, .02), (.5, .1), (1., 0.), (100., 2.)])
def test_pieces_change_nothing_and_bound_what_the_network_gets(piece, context):
    stub = Stub()
    np.testing.assert_allclose(speech_features(stub, NOISE, piece, context), speech_features(Stub(), NOISE), atol=1e-6)
    assert stub.longest <= 16_000*(piece + 2*context) + 80


def test_a_vector_is_centred_on_its_twenty_milliseconds():
    "Sample 200 of the 400 that vector j sees is sample 320 j + 160, the middle of its 320."
    middle = speech_features(Stub(), NOISE)[:, 2]; normal = (NOISE - NOISE.mean())/NOISE.std()
    np.testing.assert_allclose(middle[:300], normal[160::320][:300], atol=1e-4)


def test_volume_does_not_matter_and_whole_numbers_are_taken():
    np.testing.assert_allclose(speech_features(Stub(), NOISE*.3), speech_features(Stub(), NOISE), atol=1e-3)
    np.testing.assert_allclose(speech_features(Stub(), np.rint(NOISE*32768).astype(np.int16)), speech_features(Stub(), NOISE), atol=1e-2)


@pytest.mark.parametrize('frames', [75, [0, 3, 74], np.array([-5, 200])])
def test_windows_of_speech_are_a_function_of_the_frame_alone(frames):
    features = np.random.default_rng(1).normal(size=(150, 4)).astype(np.float32)
    windows = frame_speech(features, frames); every = np.arange(frames) if np.ndim(frames) == 0 else np.asarray(frames)
    assert windows.shape == (len(every), 10, 4) and windows.dtype == np.float32
    for frame, window in zip(every, windows):
        assert np.array_equal(window, features[np.clip(2*(frame - 1) + np.arange(10), 0, 149)])
        assert np.array_equal(window, frame_speech(features, [frame])[0])


def test_windows_of_speech_begin_with_the_mel_windows():
    assert all(abs(2*(f - 1)/50 - mel_start(f - 1)/80) < 1/80 for f in range(1, 1000))


@pytest.mark.parametrize('wav', [np.zeros((2, 16_000)), np.zeros(0)])
def test_sound_of_another_shape_is_refused(wav):
    with pytest.raises(InputError, match='expected mono samples'): speech_features(Stub(), wav)


def test_a_network_of_another_rate_is_refused():
    with pytest.raises(InputError, match='see 400 samples and move by 320'):
        speech_features(lambda x: SimpleNamespace(last_hidden_state=x.unfold(1, 400, 160)), NOISE[:3200])


def test_missing_speech_weights_name_folder_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(MissingWeights, match='config.json and model.safetensors not found in .*wav2vec2-base-960h'): Wav2Vec2Speech()
    (tmp_path/'wav2vec2-base-960h').mkdir(); (tmp_path/'wav2vec2-base-960h'/'config.json').write_text('{}')
    with pytest.raises(MissingWeights, match='Wav2Vec2: model.safetensors not found'): Wav2Vec2Speech()


@pytest.mark.skipif(importlib.util.find_spec('transformers') is not None, reason='transformers is installed')
def test_without_transformers_the_extra_is_named(tmp_path):
    for name in ('config.json', 'model.safetensors'): (tmp_path/name).write_bytes(b'{}')
    with pytest.raises(MissingExtra, match=r'talkingface\[speech\]'): Wav2Vec2Speech(tmp_path)


@pytest.fixture
def tiny(tmp_path):
    "A folder as it is published (with the head that writes letters, and other files beside), of a tiny random network."
    transformers = pytest.importorskip('transformers')
    config = transformers.Wav2Vec2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=8,
                                         conv_dim=(8,)*7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    torch.manual_seed(0); network = transformers.Wav2Vec2ForCTC(config).eval(); network.save_pretrained(tmp_path)
    (tmp_path/'pytorch_model.bin').write_bytes(b'not read')
    return tmp_path, network


def test_wav2vec2_of_a_folder_gives_the_numbers_of_the_library(tiny):
    folder, network = tiny; speech = Wav2Vec2Speech(folder)
    found = speech.features(NOISE[:32_000]); x = torch.from_numpy(np.pad((NOISE[:32_000] - NOISE[:32_000].mean())/NOISE[:32_000].std(), 40))
    with torch.no_grad(): wanted = network.wav2vec2(x[None].float()).last_hidden_state[0]
    assert found.shape == (100, 16) and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert not speech.network.training and not any(p.requires_grad for p in speech.network.parameters())


def test_wav2vec2_with_the_weight_norm_of_older_files(tiny):
    from safetensors.torch import load_file, save_file
    folder, _ = tiny; wanted = Wav2Vec2Speech(folder).features(NOISE[:8000])
    weights = {k.replace('parametrizations.weight.original0', 'weight_g').replace('parametrizations.weight.original1', 'weight_v'): v
               for k, v in load_file(folder/'model.safetensors').items() if k != 'wav2vec2.masked_spec_embed'}
    assert any(k.endswith('weight_g') for k in weights)
    save_file(weights, folder/'model.safetensors')
    np.testing.assert_array_equal(Wav2Vec2Speech(folder).features(NOISE[:8000]), wanted)


def test_wav2vec2_with_a_tensor_less_is_refused(tiny):
    from safetensors.torch import load_file, save_file
    folder, _ = tiny; weights = load_file(folder/'model.safetensors'); weights.pop('wav2vec2.encoder.layers.1.attention.k_proj.weight')
    save_file(weights, folder/'model.safetensors')
    with pytest.raises(CheckpointError, match='lacks 1 of .*k_proj'): Wav2Vec2Speech(folder)
    (folder/'config.json').write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match='of another architecture'): Wav2Vec2Speech(folder)
