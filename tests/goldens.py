"""Published-layout fixtures: read a golden, regenerate the weights that it was made with, compare.

A golden `tests/goldens/<name>/` holds what a reference implementation was fed (`inputs.npz`), what it returned
(`outputs.npz`), and `meta.json` (tolerances, and shape and hash of every weight). Weights are not stored: rule `det-v1`
makes each of them from the crc32 of its name, so that any implementation with the same names gets the same numbers.
"""
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent/'goldens'


@dataclass
class Golden:
    name: str
    meta: dict
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def load_golden(name: str, folder: Path = FOLDER) -> Golden:
    "The golden called `name`."
    def arrays(file: Path) -> dict[str, np.ndarray]:
        if not file.exists(): return {}
        with np.load(file, allow_pickle=False) as stored: return {key: stored[key] for key in stored}
    path = Path(folder)/name
    return Golden(name, json.loads((path/'meta.json').read_text()), arrays(path/'inputs.npz'), arrays(path/'outputs.npz'))


def load_manifest(name: str) -> dict[str, tuple[int, ...]]:
    "Key -> shape of the state dict that the published checkpoint `name` must have."
    params = json.loads((FOLDER/'manifests'/f'{name}.json').read_text())['params']
    return {key: tuple(shape) for key, shape in params.items()}


def det_array(key: str, shape, dtype: str = 'float32', gain: float = 2., prelu=(), const=None, salt: str = '') -> np.ndarray:
    "The value of the weight called `key` under rule det-v1."
    if const and key in const: return np.asarray(const[key], dtype).reshape(shape)
    if key.endswith('num_batches_tracked'): return np.zeros(shape, np.int64)
    noise = np.random.RandomState(zlib.crc32(f'{salt}{key}'.encode())).standard_normal(tuple(shape))
    if key.endswith('running_var'): value = 1 + .2*np.abs(noise)
    elif key.endswith('running_mean'): value = .1*noise
    elif key.endswith('weight_g'): value = .5 + .1*np.abs(noise)
    elif key in prelu: value = .25 + .05*noise
    elif len(shape) > 1: value = noise*np.sqrt(gain/float(np.prod(shape[1:])))
    elif key.endswith('weight'): value = 1 + .1*noise
    else: value = .1*noise
    return np.asarray(value, np.float32).reshape(shape).astype(dtype)


def digest(array: np.ndarray) -> str:
    "Hash of dtype, shape and bytes, as `meta.json` gives it."
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f'{array.dtype}{array.shape}'.encode() + array.tobytes()).hexdigest()[:16]


def det_state(golden: Golden, which: str | None = None) -> dict[str, torch.Tensor]:
    "The state dict that made the golden, each tensor checked against its hash; `which` picks one of several sets."
    rule = golden.meta['weights_sets'][which] if which else golden.meta['weights']
    state = {}
    for key, spec in rule['params'].items():
        extra = {name: rule[name] for name in ('prelu', 'const', 'salt') if name in rule}
        value = det_array(key, spec['shape'], spec['dtype'], rule['gain'], **extra)
        assert digest(value) == spec['sha'], f'{golden.name}: the weight {key} came out differently'
        state[key] = torch.from_numpy(value.copy())
    return state


def compare(golden: Golden, got: dict, only=None, select=None, **tolerance) -> dict[str, float]:
    """Largest difference per output; `AssertionError` where it is over the recommended tolerance.

    `only` names the outputs to look at, `select(name, array)` picks a part of both sides, `rtol=` and `atol=` override."""
    advised, worst, wrong = golden.meta.get('tolerance', {}), {}, []
    for name, want in golden.outputs.items():
        if only is not None and name not in only: continue
        if name not in got: wrong.append(f'{name} was not produced'); continue
        have = got[name].detach().cpu().numpy() if isinstance(got[name], torch.Tensor) else np.asarray(got[name])
        if select: have, want = select(name, have), select(name, want)
        if have.shape != want.shape: wrong.append(f'{name} has shape {have.shape}, expected {want.shape}'); continue
        limit = {'rtol': 1e-4, 'atol': 1e-5, **advised.get('default', {}), **advised.get(name, {}), **tolerance}
        if not np.issubdtype(want.dtype, np.inexact):          # integers: exact, unless the golden gives them an atol
            limit = {'rtol': 0., 'atol': advised.get(name, {}).get('atol', 0.), **tolerance}
        wide = np.complex128 if np.iscomplexobj(want) else np.float64
        have, want = have.astype(wide), want.astype(wide)
        with np.errstate(invalid='ignore'): gap = np.where(have == want, 0., np.abs(have - want))   # equal infinities: 0
        worst[name] = float(np.max(gap[~np.isnan(gap)], initial=0.))
        if not np.allclose(have, want, **limit, equal_nan=True):
            wrong.append(f'{name} differs by {worst[name]:.3g}, allowed {limit}')
    assert not wrong, f'{golden.name}: ' + '; '.join(wrong)
    return worst
