"""Weight files: pickles that attack do nothing, foreign objects are readable, every published nesting loads, the rest is refused by name."""
import argparse
import collections
import enum
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch

from talkingface.core import CheckpointError
from talkingface.weights import Inert, load_published, load_weights, look_up, read_inert, read_pickled, suspicious

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
MAGIC = 0x1950a86a20f9469cfc6c


def written(path, data: bytes, form: str):
    "Hand-made pickle `data` as a bare file, inside a torch zip archive, or in the older torch format."
    if form == 'bare': path.write_bytes(data)
    if form == 'zip':
        with zipfile.ZipFile(path, 'w') as archive:
            for name, content in (('data.pkl', data), ('version', b'3'), ('byteorder', b'little')): archive.writestr(f'a/{name}', content)
    if form == 'legacy': path.write_bytes(b''.join(map(pickle.dumps, (MAGIC, 1001, {}))) + data + pickle.dumps([]))
    return path


def call(module: str, name: str, *args: str) -> bytes:
    return f'c{module}\n{name}\n('.encode() + b''.join(b'V' + a.encode() + b'\n' for a in args) + b'tR'


def attacks(trap: str) -> dict:
    "Pickles that would make the file `trap` (or worse) if any of their wishes came true."
    touch, python = f'touch {trap}', f'open({trap!r}, "w").close()'
    tensor = b'ctorch._utils\n_rebuild_tensor_v2\n'
    return {
        'os.system': call('os', 'system', touch), 'posix.system': call('posix', 'system', touch),
        'subprocess': call('subprocess', 'getoutput', touch), 'eval': call('builtins', 'eval', python),
        'exec': call('builtins', 'exec', python), 'python 2 eval': call('__builtin__', 'eval', python),
        'os.mkdir': call('os', 'mkdir', trap), 'import': call('builtins', '__import__', 'antigravity'),
        'stack_global': b'\x80\x04\x8c\x05posix\x8c\x06system\x93(V' + touch.encode() + b'\ntR',
        'nested name': b'\x80\x04\x8c\x09posixpath\x8c\x09os.system\x93(V' + touch.encode() + b'\ntR',
        'inst': b'(V' + touch.encode() + b'\niposix\nsystem\n', 'obj': b'(cposix\nsystem\nV' + touch.encode() + b'\no',
        'newobj': b'\x80\x02cposix\nsystem\n(V' + touch.encode() + b'\nt\x81',
        'newobj_ex': b'\x80\x04cposix\nsystem\n(V' + touch.encode() + b'\nt}\x92',
        'getattr': b'cbuiltins\ngetattr\n(cos\n__dict__\nVsystem\ntR(V' + touch.encode() + b'\ntR',
        'partial': b'cfunctools\npartial\n(cposix\nsystem\nV' + touch.encode() + b'\ntR)R',
        'map': b'cbuiltins\nlist\n(cbuiltins\nmap\n(cposix\nsystem\n(V' + touch.encode() + b'\nltRtR',
        'setstate': b'cbuiltins\nobject\n)R}V__setstate__\ncposix\nsystem\nsbV' + touch.encode() + b'\nb',
        'setstate of a class': b'cposix\nsystem\nV' + touch.encode() + b'\nb',
        'torch.load': call('torch', 'load', trap), 'torch.hub': call('torch.hub', 'load', 'a/b', 'c'),
        'torch.serialization.os': call('torch.serialization', 'os.system', touch),
        'numpy loader': call('numpy', 'load', trap), 'code object': b'ctypes\nCodeType\n)Rctypes\nFunctionType\n)R',
        'hook': tensor + b'(V\nK\x00))\x89cposix\nsystem\n(V' + touch.encode() + b'\ntRtR',
        'attributes of torch': tensor + b'N}V__code__\ncbuiltins\neval\ns\x86b', 'defaults of torch': tensor + b'N}V__defaults__\n(K\x01ts\x86b',
        'extension': b'\x82\x01', 'popped': call('posix', 'system', touch) + b'0N', 'forgotten': call('posix', 'system', touch) + b'p0\n0N',
        'persistent': b'V' + touch.encode() + b'\nQ', 'persistent call': b'(Vmodule\ncposix\nsystem\nVa.py\nVsource\ntQ',
        'append to class': b'ccollections\ndeque\n)RV' + touch.encode() + b'\na',
        'set item of modules': b'csys\nmodules\nVos\nNs', 'buffer': b'\x80\x05\x97',
    }


NAMES = list(attacks(''))


@pytest.mark.parametrize('form', ['bare', 'zip', 'legacy'])
@pytest.mark.parametrize('name', NAMES)
def test_attacks_do_nothing(tmp_path, name, form):
    "Whatever a pickle asks for: no file appears, no module is loaded, torch is unchanged, and only inert things come back."
    trap = tmp_path/'trap'; path = written(tmp_path/'evil.pt', attacks(str(trap))[name] + b'.', form)
    before, modules = torch._utils._rebuild_tensor_v2.__defaults__, set(sys.modules)
    names = set()
    for read in (read_inert, read_pickled, lambda path, _: load_published(path)):
        try: found = read(path, names)
        except CheckpointError as error: found = None; assert str(path) in str(error)
        assert not callable(found) and (found is None or isinstance(found, (Inert, dict, str)))
    assert not trap.exists() and 'antigravity' not in sys.modules and os.system is sys.modules['os'].system
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before and torch._utils._rebuild_tensor_v2.__code__.co_name == '_rebuild_tensor_v2'
    assert set(sys.modules) - modules <= {m for m in sys.modules if m.startswith(('torch', 'encodings'))}


def test_the_attacks_are_real(tmp_path):
    "The same bytes do act when Python's own unpickler reads them, in a process of their own."
    for name in ('posix.system', 'eval', 'stack_global', 'nested name', 'inst', 'obj', 'popped', 'partial', 'map'):
        trap = tmp_path/'trap'; trap.unlink(missing_ok=True)
        subprocess.run([sys.executable, '-c', f'import pickle; pickle.loads({attacks(str(trap))[name] + b"."!r})'], capture_output=True)
        assert trap.exists(), f'the attack {name} is harmless and proves nothing'


@pytest.mark.parametrize('name', ['posix.system', 'eval', 'getattr', 'popped', 'partial', 'hook', 'torch.load', 'torch.hub', 'setstate'])
def test_attacks_are_reported(tmp_path, name):
    path = written(tmp_path/'evil.pt', attacks('x')[name] + b'.', 'zip'); names = set()
    try: read_pickled(path, names)
    except CheckpointError: pass
    assert suspicious(names), f'{names} is not reported'
    with pytest.raises(CheckpointError, match='wants to run code|damaged'): load_published(path)


def published(path, content, form):
    torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    return path


@pytest.fixture
def foreign():
    "A module with the kinds of classes that fairseq and OmegaConf put into their files; gone when the file is read."
    module = types.ModuleType('fairseq_like'); sys.modules['fairseq_like'] = module
    exec(compile('''
import enum
class Dictionary:
    def __init__(self): self.symbols, self.count, self.indices = ["<s>", "a"], [1, 2], {"<s>": 0}
class Choice(enum.Enum): hard = "hard"
class AnyNode:
    def __init__(self, value): self._val, self._metadata = value, None
class DictConfig(dict):
    def __init__(self, content): self._content, self._parent = {k: AnyNode(v) for k, v in content.items()}, None
class Slots:
    __slots__ = ("heads",)
class Listing(list): pass
class Angry:
    def __setstate__(self, state): raise SystemExit("this ran")
    def __getstate__(self): return {"a": 1}
class New:
    def __new__(cls, *args, **kwargs): return super().__new__(cls)
    def __getnewargs_ex__(self): return (1,), {"b": 2}
''', 'fairseq_like', 'exec'), module.__dict__)
    for value in vars(module).values():
        if isinstance(value, type): value.__module__ = 'fairseq_like'
    yield module
    sys.modules.pop('fairseq_like', None)


@pytest.mark.parametrize('form', ['zip', 'legacy'])
def test_foreign_objects_are_readable(tmp_path, foreign, form):
    "Configurations of other packages can be read by name although their classes do not exist here."
    slots = foreign.Slots(); slots.heads = 16; weight = torch.arange(6.).view(2, 3)
    ordered = collections.OrderedDict(weight=weight, half=weight[1].half()); ordered._metadata = collections.OrderedDict(a={'version': 1})
    content = {'model': ordered, 'args': argparse.Namespace(arch='av_hubert', layers=24), 'state': {'dictionaries': [foreign.Dictionary()]},
               'cfg': foreign.DictConfig({'heads': 16, 'mode': foreign.Choice.hard}), 'slots': slots, 'list': foreign.Listing([1, 2]),
               'angry': foreign.Angry(), 'new': foreign.New(), 'numpy': np.float32(3), 'default': collections.defaultdict(int, a=1),
               'torch': (torch.float16, torch.device('cuda:1'), torch.Size([2, 3])), 'set': {1, 2}, 'bytes': b'\x00\xff', 'long': 2**80,
               'parameter': torch.nn.Parameter(weight.clone()), 'complex': 1 + 2j}
    path = published(tmp_path/'foreign.pt', content, form); del sys.modules['fairseq_like']
    names = set(); found = read_pickled(path, names)
    assert torch.equal(found['model']['weight'], weight) and torch.equal(found['model']['half'], weight[1].half())
    assert found['model']['half'].dtype == torch.float16 and torch.equal(found['parameter'], weight)
    assert look_up(found, 'args', 'layers') == 24 and look_up(found, 'slots', 'heads') == 16
    mode = found['cfg'].fields['_content']['mode'].fields['_val']      # an enum is called, or looked up in its class before Python 3.11.4
    assert look_up(found, 'cfg', 'heads') == 16 and mode.args[-1] == 'hard'
    assert found['state']['dictionaries'][0].fields['symbols'] == ['<s>', 'a'] and found['angry'].fields == {'a': 1}
    assert found['list'].elements == [1, 2] and isinstance(found['new'], Inert) and dict(found['default']) == {'a': 1}
    assert found['torch'] == (torch.float16, torch.device('cuda:1'), torch.Size([2, 3]))
    assert found['set'] == {1, 2} and found['bytes'] == b'\x00\xff' and found['long'] == 2**80
    assert 'fairseq_like.Dictionary' in names and 'fairseq_like' not in sys.modules and not suspicious(names)
    assert list(load_published(path)) == ['weight', 'half']


@pytest.mark.parametrize('form', ['zip', 'legacy'])
def test_own_reader_equals_torch(tmp_path, form):
    "On plain files both readers give the same: types, views that share memory, strides, empty and scalar tensors."
    base = torch.arange(24.).view(4, 6)
    content = {'base': base, 'view': base[1:3, ::2], 'turned': base.T, 'wide': torch.ones(1).expand(5, 7), 'empty': torch.empty(0, 3),
               'scalar': torch.tensor(3), 'bool': torch.tensor([True, False]), 'bf16': torch.ones(2, dtype=torch.bfloat16),
               'nested': [{'a': (1, None, 'x')}, {'b': [torch.zeros(2, dtype=torch.uint8)]}]}
    path = published(tmp_path/'plain.pt', content, form)
    ours, theirs = read_inert(path), torch.load(path, weights_only=True)
    for key in ('base', 'view', 'turned', 'wide', 'empty', 'scalar', 'bool', 'bf16'):
        assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype and ours[key].stride() == theirs[key].stride()
    assert ours['nested'][0] == content['nested'][0] and torch.equal(ours['nested'][1]['b'][0], torch.zeros(2, dtype=torch.uint8))
    ours['base'][1, 0] = -1
    assert ours['view'][0, 0] == -1 == ours['turned'][0, 1]


def test_tar_of_the_first_versions(tmp_path):
    "The tar layout of torch 0.1: storages, a view of one, tensors, and a pickle that refers to them."
    values = torch.arange(6, dtype=torch.float32).numpy().tobytes()
    kind = b'ctorch\nFloatStorage\n'
    storages = pickle.dumps(1, 2) + b'\x80\x02(K\x05Vcpu\n' + kind + b't.' + struct.pack('<q', 6) + values + pickle.dumps([(7, 5, 2, 4)], 2)
    tensors = pickle.dumps(2, 2)
    for key, storage, size in ((11, 5, (2, 3)), (12, 7, (4,))):
        tensors += b'\x80\x02(K%cK%cctorch\nFloatTensor\nt.' % (key, storage)
        stride = (3, 1)[-len(size):]
        tensors += struct.pack('<ii', len(size), 0) + struct.pack(f'<{2*len(size) + 1}q', *size, *stride, 0)
    main = b'\x80\x02}(Va\nK\x0bQVb\nV12\nQVconfig\nc__main__\nNet\n)R}Vwidth\nK\x04sbu.'
    path = tmp_path/'first.pth'
    with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as archive:
        for name, data in (('storages', storages), ('tensors', tensors), ('pickle', main)):
            info = tarfile.TarInfo(name); info.size = len(data); archive.addfile(info, io.BytesIO(data))
    names = set(); found = read_pickled(path, names)
    assert torch.equal(found['a'], torch.arange(6.).view(2, 3)) and torch.equal(found['b'], torch.arange(2., 6.))
    assert look_up(found, 'config', 'width') == 4 and names == {'torch.FloatTensor', '__main__.Net'}
    assert list(load_published(path)) == ['a', 'b']


@pytest.mark.parametrize('change, words', [
    ('reach', 'reaches outside its storage'), ('negative', 'no numbers'), ('length', 'do not fit its length'), ('missing', 'damaged'),
    ('compressed', 'compressed'), ('script', 'TorchScript'), ('big', 'big-endian')])
def test_false_archives_are_refused(tmp_path, change, words):
    "Sizes that reach outside of a storage, lengths that lie, records that are missing or compressed."
    size = {'reach': b'K\x09', 'negative': b'J\xff\xff\xff\xff'}.get(change, b'K\x02')
    count = b'J\x00\x00\x00\x7f' if change == 'length' else b'K\x02'
    data = (b'\x80\x02}Va\nctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\n' + count + b'tQK\x00('
            + size + b't(K\x01t\x89Ntsc' + b'fairseq\nDictionary\n0.').replace(b'\x89Nts', b'\x89NtRs')
    with zipfile.ZipFile(tmp_path/'f.pt', 'w', zipfile.ZIP_DEFLATED if change == 'compressed' else zipfile.ZIP_STORED) as archive:
        archive.writestr('a/data.pkl', data)
        archive.writestr('a/byteorder', b'big' if change == 'big' else b'little')
        if change != 'missing': archive.writestr('a/data/0', b'\0'*8)
        if change == 'script': archive.writestr('a/constants.pkl', b'')
    with pytest.raises(CheckpointError, match=words): read_inert(tmp_path/'f.pt')
    with pytest.raises(CheckpointError): load_published(tmp_path/'f.pt')


@pytest.mark.parametrize('data', [b'', b'.', b'text', b'PK\x03\x04', b'\x80\x02', b'\x80\x02(.', b'\x80\x02t.', b'R.', b'0.', b'h\x05.',
                                  b'\x8d' + b'\xff'*7 + b'\x7f' + b'.', b'K\x01K\x02R.', b'(K\x01d.', b'}]NsN.', b'(l0'*50 + b'.', b'\xff.'])
def test_broken_pickles_give_words(tmp_path, data):
    (tmp_path/'broken.pt').write_bytes(data)
    with pytest.raises(CheckpointError, match='damaged|no torch checkpoint'): read_inert(tmp_path/'broken.pt')
    with pytest.raises(CheckpointError): load_published(tmp_path/'broken.pt')


def test_truncated_and_flipped_files(tmp_path):
    "A file cut anywhere, or with a flipped byte, gives a CheckpointError or its content; never another error."
    net = {'model': {'weight': torch.arange(40.)}, 'cfg': argparse.Namespace(a=1)}
    for form in ('zip', 'legacy'):
        whole = published(tmp_path/'whole.pt', net, form).read_bytes(); draw = np.random.default_rng(0)
        for k in range(120):
            data = bytearray(whole)
            if k % 2: del data[draw.integers(1, len(data)):]
            else: data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
            (tmp_path/'cut.pt').write_bytes(data)
            try: read_inert(tmp_path/'cut.pt')
            except CheckpointError: pass


def test_deep_and_self_containing_structures(tmp_path):
    "A hundred thousand nested lists and a list in itself are read, and their stand-ins print in one line."
    deep = b']'*100_000 + b'a'*99_999 + b'.'
    assert isinstance(read_inert(written(tmp_path/'deep.pkl', deep, 'bare')), list)
    loop = read_inert(written(tmp_path/'loop.pkl', b'ca\nB\n)R\x94}Vself\nh\x00sb.', 'bare'))
    assert loop.fields['self'] is loop and len(repr(loop)) < 60
    assert look_up({'cfg': loop}, 'cfg', 'self', 'self', default=3) is not None


@pytest.mark.parametrize('into', ['key', 'pair', 'member', 'frozen'])
def test_deep_keys_are_refused(tmp_path, into):
    "Hashing 300,000 nested tuples would end the process."
    deep = b')' + b'\x85'*300_000
    whole = {'key': b'}' + deep + b'Ns.', 'pair': b'ccollections\nOrderedDict\n]' + deep + b'N\x86a\x85R.',
             'member': b'\x8f(' + deep + b'\x90.', 'frozen': b'(' + deep + b'\x91.'}[into]
    with pytest.raises(CheckpointError, match='key or member of a set is nested'):
        read_inert(written(tmp_path/'deep.pkl', whole, 'bare'))
    for way in ('bare', 'zip', 'legacy'):
        with pytest.raises(CheckpointError, match='nested deeper'): load_published(written(tmp_path/'deep.pt', whole, way))
    assert read_inert(written(tmp_path/'flat.pkl', b'}K\x01K\x02\x86Ns.', 'bare')) == {(1, 2): None}


def test_a_text_file_is_refused_without_internals(tmp_path):
    (tmp_path/'a.pth').write_text('hello, no weights here')
    with pytest.raises(CheckpointError, match='damaged or no torch checkpoint') as caught: load_published(tmp_path/'a.pth')
    assert 'Error' not in str(caught.value)


def test_weights_that_are_not_finite_are_refused():
    net = torch.nn.Linear(2, 2); weights = {k: v*float('nan') for k, v in net.state_dict().items()}
    with pytest.raises(CheckpointError, match='NaN or infinity in 2 tensors'): load_weights(net, weights, 'a.pth')
