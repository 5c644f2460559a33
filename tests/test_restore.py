"""Restorers: the deformable convolution, both layouts of VQFR under their published names, loading, determinism, refusals."""
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from goldens import compare, det_array, det_state, load_golden, load_manifest
from talkingface.core import CheckpointError, InputError, MissingExtra, MissingWeights, ParamsError, file_hash
from talkingface.generators.restore import (RESTORERS, NetRestorer, Unsharp, VQFRv1, VQFRv2, compiled_deform_conv, deform_conv2d,
                                            load_restorer, nearest_code)

KINDS = {'vqfr_v1': VQFRv1, 'vqfr_v2': VQFRv2}
NARROW = {'vqfr_v1': dict(base=32, multipliers=(1, 1, 2), encoder_blocks=1, decoder_blocks=1, codes=16, code_dim=8, features=8),
          'vqfr_v2': dict(base=32, multipliers=(1, 1, 2), blocks=1, codes=16, code_dim=8, features=8)}


def filled(net: nn.Module) -> nn.Module:
    "Every tensor by rule det-v1, with offsets of a few pixels."
    net.load_state_dict({k: torch.from_numpy(det_array(k, v.shape)) for k, v in net.state_dict().items()})
    return net.eval()


def faces(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def published(tmp_path, name: str, wrap=lambda w: {'params_ema': w}, file: str = 'a file.pth'):
    "A narrow network of layout `name` and its file in the published nesting."
    net = filled(KINDS[name](**NARROW[name])); path = tmp_path/file
    torch.save(wrap(net.state_dict()), path)
    return net, path


# ---------------------------------------------------------------- deformable convolution

def by_hand(x, offset, weight, bias, stride, padding, dilation, mask):
    "The definition, one output value at a time: bilinear in (y, x), zero outside."
    n, channels, height, width = x.shape; out, share, kh, kw = weight.shape
    rows = (height + 2*padding[0] - dilation[0]*(kh - 1) - 1)//stride[0] + 1
    columns = (width + 2*padding[1] - dilation[1]*(kw - 1) - 1)//stride[1] + 1
    moved = offset.shape[1]//(2*kh*kw); result = np.zeros((n, out, rows, columns))
    def at(b, c, y, z):
        top, left = int(np.floor(y)), int(np.floor(z)); total = 0.
        for i in (top, top + 1):
            for j in (left, left + 1):
                if 0 <= i < height and 0 <= j < width: total += (1 - abs(y - i))*(1 - abs(z - j))*x[b, c, i, j]
        return total
    for b, o, r, s in np.ndindex(n, out, rows, columns):
        first = o//(out//(channels//share))*share; total = bias[o]
        for c in range(first, first + share):
            for i, j in np.ndindex(kh, kw):
                tap = c//(channels//moved)*kh*kw + i*kw + j
                y = r*stride[0] - padding[0] + i*dilation[0] + offset[b, 2*tap, r, s]
                z = s*stride[1] - padding[1] + j*dilation[1] + offset[b, 2*tap + 1, r, s]
                total += weight[o, c - first, i, j]*mask[b, tap, r, s]*at(b, c, y, z)
        result[b, o, r, s] = total
    return result


def deform_case(groups=2, moved=2, kernel=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), size=(7, 6), dtype=torch.float64, spread=2.):
    draw = torch.Generator().manual_seed(1); normal = lambda *s: torch.randn(*s, generator=draw, dtype=dtype)
    taps = kernel[0]*kernel[1]
    rows, columns = ((n + 2*p - d*(k - 1) - 1)//s + 1 for n, p, d, k, s in zip(size, padding, dilation, kernel, stride))
    return dict(x=normal(2, 4, *size), offset=spread*normal(2, 2*taps*moved, rows, columns), weight=normal(8, 4//groups, *kernel),
                bias=normal(8), mask=normal(2, taps*moved, rows, columns).sigmoid()), dict(stride=stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize('sizes', [dict(), dict(groups=1, moved=4), dict(groups=4, moved=1, stride=(1, 1), kernel=(3, 3)), dict(spread=9.)], ids=str)
def test_deform_conv2d_is_its_definition(sizes):
    tensors, steps = deform_case(**sizes)
    want = by_hand(**{k: v.numpy() for k, v in tensors.items()}, **steps)
    np.testing.assert_allclose(deform_conv2d(**tensors, **steps), want, atol=1e-10)


def test_deform_conv2d_gives_the_numbers_of_torchvision():
    "Made where the compiled operator ran."
    golden = load_golden('deform_conv2d'); tensors = {k: torch.from_numpy(v) for k, v in golden.inputs.items()}
    steps = {k: tuple(v) for k, v in golden.meta['steps'].items()}
    masked = deform_conv2d(**tensors, **steps); tensors.pop('mask')
    compare(golden, {'masked': masked, 'plain': deform_conv2d(**tensors, **steps)})


@pytest.mark.skipif(compiled_deform_conv() is None, reason="torchvision's compiled operators are not here")
@pytest.mark.parametrize('sizes', [dict(), dict(groups=1, moved=4), dict(spread=9.), dict(dtype=torch.float32)], ids=str)
def test_deform_conv2d_is_that_of_torchvision(sizes):
    tensors, steps = deform_case(**sizes)
    want = compiled_deform_conv()(*(tensors[k] for k in ('x', 'offset', 'weight', 'bias')), mask=tensors['mask'], **steps)
    torch.testing.assert_close(deform_conv2d(**tensors, **steps), want, atol=1e-4 if want.dtype == torch.float32 else 1e-10, rtol=1e-5)


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('steps', [dict(), dict(stride=2, padding=1), dict(padding=(2, 1), dilation=(2, 1))], ids=str)
def test_without_offsets_it_is_the_plain_convolution(groups, steps):
    x, weight, bias = torch.randn(2, 4, 9, 8), torch.randn(4, 4//groups, 3, 3), torch.randn(4)
    want = F.conv2d(x, weight, bias, groups=groups, **steps)
    torch.testing.assert_close(deform_conv2d(x, torch.zeros(2, 18, *want.shape[2:]), weight, bias, **steps), want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize('dy, dx', [(1, 0), (0, -2), (3, 2), (-9, 0)])
def test_whole_offsets_shift_the_input(dy, dx):
    x, weight = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3)
    offset = torch.tensor([float(dy), float(dx)]).repeat(9).view(1, 18, 1, 1).expand(1, 18, 8, 8)
    wide = F.pad(x, (12,)*4); shifted = wide[:, :, 11 + dy:21 + dy, 11 + dx:21 + dx]
    torch.testing.assert_close(deform_conv2d(x, offset, weight, padding=1), F.conv2d(shifted, weight), atol=1e-5, rtol=1e-5)


def test_offset_groups_move_their_own_channels():
    x = torch.randn(1, 4, 8, 8); weight = torch.eye(4)[..., None, None]
    offset = torch.zeros(1, 4, 8, 8); offset[:, 3] = 1                     # the second half looks one column to the right
    moved = deform_conv2d(x, offset, weight)
    torch.testing.assert_close(moved[:, :2], x[:, :2])
    torch.testing.assert_close(moved[:, 2:, :, :-1], x[:, 2:, :, 1:])
    assert (moved[:, 2:, :, -1] == 0).all()


def test_gradients_of_deform_conv2d():
    tensors, steps = deform_case(size=(4, 4), kernel=(2, 2), spread=.7)
    inputs = tuple(tensors[k].requires_grad_() for k in ('x', 'offset', 'weight', 'bias', 'mask'))
    def f(x, offset, weight, bias, mask): return deform_conv2d(x, offset, weight, bias, mask=mask, **steps)
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize('change, words', [(dict(offset=torch.zeros(2, 18, 3, 3)), 'expected offset'), (dict(mask=torch.zeros(2, 8, 8, 8)), 'expected mask'),
                                           (dict(weight=torch.zeros(4, 3, 3, 3)), 'do not fit'), (dict(offset=torch.zeros(2, 7, 8, 8)), 'expected offset')])
def test_shapes_that_do_not_fit_are_refused(change, words):
    given = dict(x=torch.zeros(2, 4, 8, 8), offset=torch.zeros(2, 18, 8, 8), weight=torch.zeros(4, 4, 3, 3)) | change
    with pytest.raises(InputError, match=words): deform_conv2d(**given, padding=1)


# ---------------------------------------------------------------- VQFR

@pytest.mark.parametrize('name', KINDS)
def test_names_and_shapes_are_the_published_ones(name):
    with torch.device('meta'): own = {k: tuple(v.shape) for k, v in KINDS[name]().state_dict().items()}
    assert own == load_manifest(name)


@pytest.mark.parametrize('name', KINDS)
def test_numbers_are_those_of_the_source(name):
    "Narrow networks on the same weights; version 2 at three fidelities."
    golden = load_golden(f'{name}_narrow'); face = torch.from_numpy(golden.inputs['face']); got = {}
    for output in golden.outputs:
        _, _, fidelity = output.partition('_')
        net = KINDS[name](**golden.meta['config'], **({'fidelity': float(fidelity)} if fidelity else {})).eval()
        net.load_state_dict(det_state(golden))
        with torch.inference_mode(): got[output] = net(face)
    compare(golden, got)


@pytest.mark.parametrize('name', KINDS)
def test_published_files_load_strictly(tmp_path, name):
    "The full size, from values that a seed gives, in the published nesting."
    draw = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(shape, generator=draw)*.05 for k, shape in load_manifest(name).items()}
    path = tmp_path/RESTORERS[name].file; torch.save({'params_ema': weights, 'params': {'other': torch.zeros(1)}}, path)
    restorer = load_restorer(name, checkpoint=path); own = restorer.net.state_dict()
    assert own.keys() == weights.keys() and all(torch.equal(own[k], weights[k]) for k in own)
    assert restorer.name == name and restorer.sha256 == file_hash(path) and restorer.sha256[:8] in restorer.protocol
    assert not restorer.net.training and not any(p.requires_grad for p in restorer.net.parameters())


@pytest.mark.parametrize('wrap', [lambda w: {'params_ema': w, 'params': {k: v + 1 for k, v in w.items()}}, lambda w: {'params': w}, lambda w: w,
                                  lambda w: {'params_ema': {f'module.{k}': v for k, v in w.items()}}], ids=['ema and plain', 'params', 'bare', 'module'])
@pytest.mark.parametrize('name', KINDS)
def test_nestings(tmp_path, name, wrap):
    net, path = published(tmp_path, name, wrap)
    loaded = load_restorer(name, checkpoint=path, size=32, **NARROW[name]).net.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize('name', KINDS)
def test_batch_is_one_by_one_and_runs_are_equal(tmp_path, name):
    net, path = published(tmp_path, name)
    restorer = load_restorer(name, checkpoint=path, size=64, **NARROW[name])
    x = faces(3, 48); kept = x.copy(); y = restorer.restore(x)
    assert y.shape == x.shape and y.dtype == np.uint8 and np.array_equal(x, kept)
    assert np.array_equal(y, np.concatenate([restorer.restore(x[i:i + 1]) for i in range(3)]))
    assert np.array_equal(y, load_restorer(name, checkpoint=path, size=64, **NARROW[name]).restore(x))
    restorer.piece = 2
    assert np.abs(restorer.restore(x).astype(int) - y).max() <= 1
    assert len(np.unique(y)) > 10


@pytest.mark.parametrize('name', KINDS)
def test_networks_are_fed_what_they_were_made_for(name):
    "RGB in [-1, 1] at the network's size; what comes out beyond the range is cut off."
    seen = []
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.unused = nn.Parameter(torch.zeros(1))
        def forward(self, x): seen.append(x); return 3*x
    y = NetRestorer(name, Net(), size=64).restore(np.stack([np.full((3, 32, 32), v, np.uint8) for v in (0, 120, 255)]))
    assert [x.shape for x in seen] == [(1, 3, 64, 64)]*3
    assert [round(x.mean().item(), 4) for x in seen] == [-1, round(120/127.5 - 1, 4), 1]
    assert y[:, 0, 0, 0].tolist() == [0, round((3*(120/127.5 - 1) + 1)*127.5), 255]


def test_fidelity_weighs_the_main_branch(tmp_path):
    net, path = published(tmp_path, 'vqfr_v2'); x = faces(1)
    at = {f: load_restorer('vqfr_v2', checkpoint=path, size=32, **NARROW['vqfr_v2'], fidelity=f) for f in (0., .1, 1.)}
    assert not np.array_equal(at[0.].restore(x), at[1.].restore(x)) and 'fidelity 0.1' in at[.1].protocol
    default = load_restorer('vqfr_v2', checkpoint=path, size=32, **NARROW['vqfr_v2'])
    assert np.array_equal(default.restore(x), at[.1].restore(x)) and 'fidelity 0.1' in default.protocol
    with pytest.raises(ParamsError, match='fidelity in'): load_restorer('vqfr_v2', checkpoint=path, fidelity=2.)


@pytest.mark.parametrize('name', KINDS)
def test_gradients_reach_every_parameter_of_the_output(name):
    "What is not reached is known: codes are picked, and version 1 draws no face from the texture alone."
    net = filled(KINDS[name](**NARROW[name])); net(torch.rand(1, 3, 32, 32)*2 - 1).square().mean().backward()
    without = {k.split('.')[0] if k.startswith(('encoder', 'feat2index', 'inpfeat')) else k for k, p in net.named_parameters() if p.grad is None}
    assert without == {'vqfr_v1': {'encoder', 'quantizer.quantize_dict.Level_4.quant_conv.weight', 'quantizer.quantize_dict.Level_4.quant_conv.bias',
                                   'decoder.conv_out.0.weight', 'decoder.conv_out.0.bias', 'decoder.conv_out.2.weight', 'decoder.conv_out.2.bias'},
                       'vqfr_v2': {'encoder', 'feat2index'}}[name]


def test_nearest_code_is_the_nearest():
    z, codes = torch.randn(2, 5, 3, 4), torch.randn(7, 5)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 5)
    want = codes[torch.cdist(flat, codes).argmin(1)].view(2, 3, 4, 5).permute(0, 3, 1, 2)
    assert torch.equal(nearest_code(z, codes), want)


@pytest.mark.parametrize('name', KINDS)
def test_sizes_that_do_not_halve_are_refused(name):
    with pytest.raises(InputError, match='multiple of 4 px'): KINDS[name](**NARROW[name])(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ParamsError, match='multiple of 32 channels'): KINDS[name](**NARROW[name] | {'base': 24})


def test_converted_weights_are_taken(tmp_path):
    from talkingface.experts.checkpoints import convert_weights
    net, path = published(tmp_path, 'vqfr_v2'); folder = convert_weights(path, tmp_path/'converted')
    loaded = load_restorer('vqfr_v2', checkpoint=folder, size=32, **NARROW['vqfr_v2']); x = faces(1)
    assert np.array_equal(loaded.restore(x), NetRestorer('same', net, size=32).restore(x)) and loaded.sha256 == file_hash(folder/'model.safetensors')


# ---------------------------------------------------------------- refusals

def test_files_of_other_networks_are_named(tmp_path):
    _, path = published(tmp_path, 'vqfr_v1')
    with pytest.raises(CheckpointError, match='holds vqfr_v1, not vqfr_v2'): load_restorer('vqfr_v2', checkpoint=path)
    with pytest.raises(CheckpointError, match='another architecture than VQFRv1.*lacks'): load_restorer('vqfr_v1', checkpoint=path)
    torch.save({'params_ema': {'toRGB.0.weight': torch.zeros(1)}}, tmp_path/'g.pth')
    with pytest.raises(CheckpointError, match='holds gfpgan, not vqfr_v1'): load_restorer('vqfr_v1', checkpoint=tmp_path/'g.pth')
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path/'b.pth')
    with pytest.raises(CheckpointError, match=r'no codeformer: it holds 2 tensors \(bias, weight\)'): load_restorer('codeformer', checkpoint=tmp_path/'b.pth')


def test_one_shape_or_name_off_is_refused(tmp_path):
    net = filled(VQFRv2(**NARROW['vqfr_v2'])); state = net.state_dict()
    for change, words in (({'inpfeat_extraction.bias': torch.zeros(3)}, r'inpfeat_extraction.bias \(3,\) for \(8,\)'), ({'extra': torch.zeros(1)}, 'unexpected keys'),
                          ({'inpfeat_extraction.bias': torch.full((8,), torch.nan)}, 'NaN')):
        torch.save({'params_ema': state | change}, tmp_path/'x.pth')
        with pytest.raises(CheckpointError, match=words): load_restorer('vqfr_v2', checkpoint=tmp_path/'x.pth', **NARROW['vqfr_v2'])


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    import os
    class Bad:
        def __reduce__(self): return os.system, ('true',)
    torch.save({'params_ema': {'feat2index.1.weight': torch.zeros(1)}, 'x': Bad()}, tmp_path/'bad.pth')
    with pytest.raises(CheckpointError, match='refused'): load_restorer('vqfr_v2', checkpoint=tmp_path/'bad.pth')


@pytest.mark.parametrize('name', [n for n, recipe in RESTORERS.items() if recipe.file])
def test_missing_weights_name_file_source_and_terms(tmp_path, monkeypatch, name):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(MissingWeights, match=RESTORERS[name].file.replace('.', r'\.')) as caught: load_restorer(name)
    assert RESTORERS[name].source in str(caught.value) and RESTORERS[name].licence in str(caught.value)
    with pytest.raises(CheckpointError, match='nowhere.pth'): load_restorer(name, checkpoint=tmp_path/'nowhere.pth')


def test_the_file_in_the_weights_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path)); published(tmp_path, 'vqfr_v2', file=RESTORERS['vqfr_v2'].file)
    assert load_restorer('vqfr_v2', **NARROW['vqfr_v2']).size == 512


@pytest.mark.parametrize('name, options, kind, words', [
    ('vqfr', {}, ParamsError, "did you mean 'vqfr_v"), ('vqfr_v1', {'fidelity': .1}, ParamsError, "unknown key 'fidelity'"),
    ('unsharp', {'amonut': 1}, ParamsError, "did you mean 'amount'"), ('unsharp', {'checkpoint': 'x.pth'}, InputError, 'no weights'),
    ('vqfr_v1', {'device': 'gpu'}, ParamsError, "got 'gpu'"), ('unsharp', {'radius': 0}, ParamsError, 'radius > 0')])
def test_wrong_arguments(name, options, kind, words):
    with pytest.raises(kind, match=words): load_restorer(name, **options)


@pytest.mark.parametrize('given', [faces(1)[0], faces(1)/255, faces(1)[:, :2], faces(1)[:, :, :16], faces(1).astype(np.int64)], ids=lambda a: f'{a.shape} {a.dtype}')
def test_other_faces_are_refused(given):
    with pytest.raises(InputError, match='expected square faces'): Unsharp().restore(given)


# ---------------------------------------------------------------- unsharp, spandrel

def test_unsharp_is_that_of_scikit_image():
    from skimage.filters import unsharp_mask
    x = faces(2, 24); y = load_restorer('unsharp', radius=2., amount=.5).restore(x)
    want = unsharp_mask(x[1].transpose(1, 2, 0), radius=2., amount=.5, channel_axis=2).transpose(2, 0, 1)*255
    assert y.dtype == np.uint8 and np.abs(y[1] - want).max() <= .5 + 1e-6
    assert Unsharp(amount=0.).restore(x).tolist() == x.tolist() and Unsharp().restore(x[:0]).shape == (0, 3, 24, 24)
    assert 'radius 2.0' in load_restorer('unsharp', radius=2.).protocol


@pytest.mark.parametrize('name', ['gfpgan', 'codeformer'])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, 'spandrel', None)
    torch.save({'params_ema': {RESTORERS[name].key: torch.zeros(1)}}, tmp_path/'x.pth')
    with pytest.raises(MissingExtra, match=r'talkingface\[restore\]'): load_restorer(name, checkpoint=tmp_path/'x.pth')


@pytest.mark.parametrize('name', ['gfpgan', 'codeformer'])
def test_networks_of_spandrel(tmp_path, name):
    "Values that a seed gives, through the file, the reader and spandrel; the same bytes twice."
    pytest.importorskip('spandrel')
    if name == 'gfpgan':
        from spandrel.architectures.GFPGAN import GFPGAN
        with torch.device('meta'): net = GFPGAN(
            out_size=512, num_style_feat=512, channel_multiplier=2, decoder_load_path=None, fix_decoder=False, num_mlp=8, input_is_latent=True,
            different_w=True, narrow=1, sft_half=True)
    else:
        net = pytest.importorskip('spandrel_extra_arches.architectures.CodeFormer').CodeFormer()
    draw = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(v.shape, generator=draw)*.02 for k, v in net.state_dict().items()}
    torch.save({'params_ema': weights}, tmp_path/'x.pth'); del net
    restorer = load_restorer(name, checkpoint=tmp_path/'x.pth'); x = faces(1, 64)
    assert all(torch.equal(v, weights[k]) for k, v in restorer.net.net.state_dict().items())
    if name == 'codeformer': assert restorer.net.arguments == {'weight': .5} and 'fidelity 0.5' in restorer.protocol   # slow on a CPU
    else: assert (y := restorer.restore(x)).shape == x.shape and np.array_equal(y, restorer.restore(x))
    torch.save({'params_ema': {k: v for k, v in weights.items() if k != next(reversed(weights))}}, tmp_path/'less.pth')
    with pytest.raises(CheckpointError, match='spandrel .* cannot build'): load_restorer(name, checkpoint=tmp_path/'less.pth')
