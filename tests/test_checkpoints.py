"""load_expert: every published nesting of every architecture, strictly; what is missing, left out or of another architecture is said."""
import sys
import types
import warnings

import pytest
import torch

from goldens import load_manifest
from talkingface.core import CheckpointError, InputError, MissingWeights, ParamsError
from talkingface.experts import load_expert
from talkingface.experts.avhubert import BASE, LARGE, TINY, AVHubert
from talkingface.experts.avsyncnet import ResNet50
from talkingface.experts.checkpoints import KNOWN_FILES, build_expert, convert_weights, recognise, weights_table
from talkingface.weights import save_model

NESTINGS = {
    'bare': lambda w: w,
    'state_dict': lambda w: {'state_dict': w, 'optimizer': None, 'global_step': 7},
    'model': lambda w: {'model': w, 'extra_state': {'epoch': 3}},
    'module': lambda w: {f'module.{k}': v for k, v in w.items()},
    'state_dict, module': lambda w: {'state_dict': {f'module.{k}': v for k, v in w.items()}},
}


def generated(manifest: dict, seed: int = 0) -> dict:
    "Weights of the shapes of a manifest; whole numbers where they count batches."
    draw = torch.Generator().manual_seed(seed)
    return {k: torch.tensor(3) if k.endswith('num_batches_tracked') else torch.randn(s, generator=draw)*.05 + .5*k.endswith('running_var')
            for k, s in manifest.items()}


@pytest.mark.parametrize('nesting', NESTINGS)
@pytest.mark.parametrize('name, manifest', [('syncnet', 'wav2lip_syncnet_color'), ('syncnet_v2', 'syncnet_python_S')])
def test_published_files_load_strictly(tmp_path, name, manifest, nesting):
    weights = generated(load_manifest(manifest)); path = tmp_path/'a file.pth'
    torch.save(NESTINGS[nesting](weights), path)
    expert = load_expert(name, path); own = expert.state_dict()
    assert own.keys() == weights.keys() and all(torch.equal(own[k], weights[k]) for k in own)
    assert not expert.training and not any(p.requires_grad for p in expert.parameters()) and len(expert.meta['sha256']) == 64


@pytest.mark.parametrize('prefix', ['', '__S__.', 'module.', 'module.__S__.'])
def test_a_speaker_network_starts_the_audio_encoder(tmp_path, prefix):
    manifest = load_manifest('resnetse34L'); weights = {k: v for k, v in generated(manifest).items() if not k.startswith('torchfb')}
    head = {'__L__.criterion.weight': torch.zeros(2)} if prefix else {}
    torch.save({f'{prefix}{k}': v for k, v in generated(manifest).items()} | head, tmp_path/'baseline_lite_ap.model')
    with pytest.warns(UserWarning, match='face_encoder has fresh weights'):
        expert = load_expert('avsyncnet', tmp_path/'baseline_lite_ap.model', width=.125)
    own = expert.audio_encoder.state_dict()
    assert own.keys() == weights.keys() and all(torch.equal(own[k], weights[k]) for k in own)
    assert expert.meta['untrained'] == ['face_encoder']


def test_a_speaker_network_of_other_bands_is_refused_in_words(tmp_path):
    torch.save(generated(load_manifest('resnetse34V2')), tmp_path/'v2.model')
    with pytest.raises(CheckpointError, match='64 mel bands'): load_expert('avsyncnet', tmp_path/'v2.model')


def test_imagenet_starts_the_image_encoder(tmp_path):
    "torchvision's ResNet-50: its stem folded to 15 channels, its classifier left to chance; other widths are refused in words."
    weights = generated({k: v.shape for k, v in ResNet50().state_dict().items()}); torch.save(weights, tmp_path/'r50.pth')
    with pytest.warns(UserWarning, match='audio_encoder has fresh weights'): expert = load_expert('avsyncnet', tmp_path/'r50.pth')
    assert torch.equal(expert.face_encoder.layer4[2].conv3.weight, weights['layer4.2.conv3.weight'])
    torch.testing.assert_close(expert.face_encoder.conv1.weight.sum(1), weights['conv1.weight'].mean(1)*3)
    assert 'ImageNet' in expert.meta['licence'] and expert.meta['untrained'] == ['audio_encoder']
    with pytest.raises(CheckpointError, match='needs AVSyncNet of width 1'): load_expert('avsyncnet', tmp_path/'r50.pth', width=.5)


@pytest.mark.parametrize('config', [
    {'name': 'syncnet', 'width': .125}, {'name': 'syncnet_v2', 'width': .0625, 'dim': 32}, {'name': 'light_syncnet', 'width': 8, 'dim': 16},
    {'name': 'avsyncnet', 'width': .125, 'dim': 32, 'audio': 'V2', 'size': 64}, {'name': 'avsyncnet', 'width': .0625, 'audio_width': .5, 'size': 64},
    {'name': 'avhubert', 'net': {**TINY, 'front_width': .0625, 'fuse': 'add'}}, {'name': 'avhubert', 'net': {**TINY, 'clusters': 0, 'predict': False}}],
    ids=lambda c: c['name'])
def test_sizes_of_bare_narrow_networks_come_from_shapes(tmp_path, config):
    "A state dict without its config: every width, layout and dimension is found again."
    expert = build_expert(config); torch.save(expert.state_dict(), tmp_path/'bare.pth')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); loaded = load_expert(config['name'], tmp_path/'bare.pth')
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in expert.state_dict().items())


def test_a_false_name_does_not_lend_its_licence(tmp_path):
    torch.save(generated(load_manifest('wav2lip_syncnet_color')), tmp_path/'syncnet_v2.model')
    assert 'non-commercial' in load_expert('syncnet', tmp_path/'syncnet_v2.model').meta['licence']


def test_batch_counters_may_be_absent_and_nothing_else(tmp_path):
    weights = generated(load_manifest('syncnet_python_S'))
    old = {k: v for k, v in weights.items() if 'num_batches_tracked' not in k}
    torch.save(old, tmp_path/'old.model')
    assert load_expert('syncnet_v2', tmp_path/'old.model').meta['counters_filled'] == len(weights) - len(old)
    torch.save({k: v for k, v in old.items() if k != 'netfclip.1.bias'}, tmp_path/'less.model')
    with pytest.raises(CheckpointError, match='lacks 1 of .*netfclip.1.bias'): load_expert('syncnet_v2', tmp_path/'less.model')
    torch.save(old | {'netfclip.9.bias': torch.zeros(1)}, tmp_path/'more.model')
    with pytest.raises(CheckpointError, match='unexpected keys .*netfclip.9.bias'): load_expert('syncnet_v2', tmp_path/'more.model')


@pytest.mark.parametrize('size, tensors, elements', [(BASE, 346, 103_339_900), (LARGE, 538, 325_408_124)], ids=['base', 'large'])
def test_published_sizes_of_avhubert(size, tensors, elements):
    "Number of tensors and of elements of the published networks, 2000 clusters and 4 symbols; nothing is allocated."
    with torch.device('meta'): state = AVHubert(**size).state_dict()
    assert len(state) == tensors and sum(v.numel() for v in state.values()) == elements


@pytest.mark.parametrize('size', [BASE, LARGE], ids=['base', 'large'])
@pytest.mark.parametrize('prefix', ['', 'encoder.w2v_model.'])
def test_published_avhubert_is_recognised_from_its_shapes(size, prefix):
    "Pre-trained and fine-tuned; the decoder is named as left out."
    with torch.device('meta'): state = AVHubert(**size).state_dict()
    weights = {prefix + k: v for k, v in state.items() if not prefix or 'final_proj' not in k}
    if prefix: weights |= {'decoder.embed_tokens.weight': torch.empty(1000, 8, device='meta'), 'decoder.layer_norm.bias': torch.empty(8, device='meta')}
    found = recognise(weights); net = found.config['net']
    assert {k: net[k] for k in size if k in net} == size and net['predict'] is (not prefix) and net['clusters'] == 2004
    assert ('fine-tuned' in found.what) is bool(prefix) and found.left_out == ({'decoder': 2} if prefix else {})
    with torch.device('meta'): expert = build_expert(found.config)
    assert expert.net.state_dict().keys() == found.weights.keys()


@pytest.fixture
def fairseq_like():
    "Classes that a fairseq checkpoint names; they are gone when the file is read."
    module = types.ModuleType('fairseq_data_dictionary')
    class Dictionary:
        def __init__(self): self.symbols, self.count = ['<s>', 'a'], [1, 2]
    class Config(dict): pass
    for kind in (Dictionary, Config): kind.__module__, kind.__qualname__ = module.__name__, kind.__name__; setattr(module, kind.__name__, kind)
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('tuned', [False, True], ids=['pre-trained', 'fine-tuned'])
def test_fairseq_files_load_without_their_classes(tmp_path, fairseq_like, tuned, legacy):
    torch.manual_seed(0); expert = build_expert({'name': 'avhubert', 'net': {**TINY, 'heads': 8}}).eval()
    state = expert.net.state_dict()
    if tuned: state = {f'encoder.w2v_model.{k}': v for k, v in state.items() if 'final_proj' not in k} | {'decoder.x': torch.zeros(1)}
    model = {'encoder_attention_heads': 8, 'layer_norm_first': True}
    cfg = fairseq_like.Config(model={'w2v_args': fairseq_like.Config(model=model)} if tuned else model)
    torch.save({'cfg': cfg, 'args': None, 'model': state, 'task_state': {'dictionaries': [fairseq_like.Dictionary()]}}, tmp_path/'x.pt',
               _use_new_zipfile_serialization=not legacy)
    sys.modules.pop(fairseq_like.__name__)
    loaded = load_expert('avhubert', tmp_path/'x.pt')
    assert loaded.config['net']['heads'] == 8 and 'fairseq_data_dictionary.Dictionary' in loaded.meta['not_run']
    audio, video = torch.randn(1, 9, 104), torch.randn(1, 1, 9, 88, 88)
    with torch.no_grad(): torch.testing.assert_close(loaded.net.features(audio, video), expert.net.features(audio, video))
    folder = convert_weights(tmp_path/'x.pt', tmp_path/'converted')
    again = load_expert('avhubert', folder)
    with torch.no_grad(): torch.testing.assert_close(again.net.features(audio, video), expert.net.features(audio, video))


def test_another_architecture_is_refused_by_name(tmp_path):
    torch.save(generated(load_manifest('wav2lip_syncnet_color')), tmp_path/'a.pth')
    with pytest.raises(CheckpointError, match='is SyncNet of Wav2Lip, not syncnet_v2'): load_expert('syncnet_v2', tmp_path/'a.pth')
    torch.save({'something': torch.zeros(2)}, tmp_path/'b.pth')
    with pytest.raises(CheckpointError, match='no architecture that is known'): load_expert('avhubert', tmp_path/'b.pth')
    with pytest.raises(ParamsError, match="did you mean 'avsyncnet'"): load_expert('avsyncnett', tmp_path/'a.pth')


def test_known_files_are_found_and_named(tmp_path, monkeypatch):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(MissingWeights, match='syncnet_v2.model'): load_expert('syncnet_v2')
    torch.save(generated(load_manifest('syncnet_python_S')), tmp_path/'syncnet_v2.model')
    assert load_expert('syncnet_v2').meta['licence'] == 'MIT'
    rows = {row['name']: row for row in weights_table()}
    assert len(rows) == len(KNOWN_FILES) and rows['syncnet_v2.model']['present'] and not rows['large_vox_433h.pt']['present']
    assert len(rows['syncnet_v2.model']['sha256']) == 64 and all(row['licence'] and row['what'] for row in rows.values())


def test_the_file_of_our_folder_is_the_folder(tmp_path):
    expert = build_expert({'name': 'avhubert', 'net': {**TINY, 'heads': 8}, 'layer': 2, 'phones': ['a'], 'shrink': 2})
    save_model(tmp_path/'ours', expert, {})
    assert load_expert('avhubert', tmp_path/'ours'/'model.safetensors').config == expert.config
    for out in ('other', 'ours'):
        with pytest.raises(InputError, match='need no conversion'): convert_weights(tmp_path/'ours'/'model.safetensors', tmp_path/out)
    assert load_expert('avhubert', tmp_path/'ours').config == expert.config


def test_a_licence_is_told_by_likeness_for_published_sizes_only(tmp_path):
    torch.save(generated(load_manifest('syncnet_python_S')), tmp_path/'renamed.pth')
    assert load_expert('syncnet_v2', tmp_path/'renamed.pth').meta['licence'] == 'MIT'
    torch.save(build_expert({'name': 'syncnet_v2', 'width': .125}).state_dict(), tmp_path/'narrow.pth')
    assert 'unknown' in load_expert('syncnet_v2', tmp_path/'narrow.pth').meta['licence']


def test_heads_that_do_not_divide_are_refused_and_guesses_are_said(tmp_path):
    state = build_expert({'name': 'avhubert', 'net': TINY}).net.state_dict()
    torch.save({'model': state, 'cfg': {'model': {'encoder_attention_heads': 5}}}, tmp_path/'five.pt')
    with pytest.raises(CheckpointError, match='5 attention heads'): load_expert('avhubert', tmp_path/'five.pt')
    torch.save(state, tmp_path/'none.pt')
    with pytest.warns(UserWarning, match='2 are taken'): load_expert('avhubert', tmp_path/'none.pt')


@pytest.mark.parametrize('options, words', [(dict(device='gpu'), "got 'gpu'"), (dict(widht=1), "did you mean 'width'")])
def test_wrong_arguments_of_load_expert(tmp_path, options, words):
    save_model(tmp_path/'ours', build_expert({'name': 'light_syncnet', 'width': 8, 'dim': 16}), {})
    with pytest.raises(ParamsError, match=words): load_expert('light_syncnet', tmp_path/'ours', **options)


@pytest.mark.parametrize('meta, words', [('[]', 'weights_sha256'), ('{"config": {"name": "light_syncnet"}}', 'weights_sha256'), (None, 'a trained network')])
def test_broken_folders_are_refused_in_words(tmp_path, meta, words):
    if meta: (tmp_path/'meta.json').write_text(meta)
    with pytest.raises(CheckpointError, match=words): load_expert('light_syncnet', tmp_path)


def test_a_folder_of_a_generator_is_no_expert(tmp_path):
    save_model(tmp_path, torch.nn.Linear(1, 1), {'config': {'name': 'light'}})
    with pytest.raises(CheckpointError, match="'light', which is no expert"): load_expert('syncnet', tmp_path)
