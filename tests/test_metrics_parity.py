"""PSNR, SSIM and LSE against values recorded from the published code (scikit-image, piq, syncnet_python)."""
import numpy as np
import pytest
import torch
from goldens import compare, load_golden

from talkingface.metrics.image import SSIM_SETTINGS, _ssim_maps, psnr, ssim, ssim_frames
from talkingface.metrics.sync import frame_confidence, lse, lse_distances

IMAGES = ('noisy', 'shifted', 'dark', 'same')
CASES = ('random', 'shift3', 'shiftm5', 'short', 'tie', 'long1024')
as_clip = lambda image: image.transpose(2, 0, 1)[None]


def image_outputs(inputs) -> dict:
    "Every scikit-image and piq number of the golden, from our functions."
    got = {}
    ref = as_clip(inputs['ref'])
    x5 = lambda image: image.repeat(5, -1).repeat(5, -2)
    for name in IMAGES:
        other = as_clip(inputs[name])
        span2 = [(x / 127.5 - 1).astype(np.float32) for x in (ref, other)]
        unit = [x / 255. for x in (ref, other)]
        got |= {f'psnr_u8_{name}': psnr(other, ref), f'ssim_default_u8_{name}': ssim(other, ref, 'uniform'),
                f'ssim_gauss_u8_{name}': ssim(other, ref), f'ssim_gauss_samplecov_u8_{name}': ssim(other, ref, 'gaussian_sample'),
                f'ssim_grey_gauss_{name}': ssim(other, ref, 'grey'), f'ssim_float01_gauss_{name}': ssim(unit[1], unit[0]),
                f'ssim_f32_minus1_1_range2_{name}': np.float32(ssim(span2[1], span2[0], 'uniform', data_range=2)),
                f'piq_psnr_{name}': np.float32([min(psnr(other, ref), 80)]), f'piq_ssim_{name}': np.float32([ssim(other, ref, 'piq')])}
    noisy = as_clip(inputs['noisy'])
    got['piq_ssim_x5_noisy'] = np.float32([ssim(x5(noisy), x5(ref), 'piq')])
    got['piq_ssim_x5_noisy_nodownsample'] = np.float32([ssim(x5(noisy), x5(ref))])
    return got


def test_image_metrics_meet_the_golden():
    golden = load_golden('ssim_psnr')
    compare(golden, image_outputs(golden.inputs), only=[k for k in golden.outputs if k != 'ssim_map_gauss_noisy'])


def test_ssim_map_inside_the_border():
    "The recorded map also shows padded borders, which no mean uses; inside, ours is the same."
    golden = load_golden('ssim_psnr')
    x, y = (torch.from_numpy(as_clip(golden.inputs[n])).double() for n in ('noisy', 'ref'))
    ours = _ssim_maps(x, y, 255., SSIM_SETTINGS['gaussian'])[0].numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(ours, golden.outputs['ssim_map_gauss_noisy'][5:-5, 5:-5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_lse_meets_the_golden(case):
    golden = load_golden('syncnet_python_lse')
    distances = lse_distances(golden.inputs[f'{case}_im'], golden.inputs[f'{case}_cc'])
    result = lse(distances)
    got = {'dists': distances, 'mdist': distances.mean(0), 'offset': np.int64(result.offset), 'conf': np.float32(result.confidence),
           'minval': np.float32(result.distance), 'fconfm': frame_confidence(distances)}
    got = {f'{case}_{k}': v for k, v in got.items()}
    compare(golden, got, only=list(got))


def test_ssim_equals_scikit_image_on_fresh_frames():
    "Float32, as evaluation uses it, against scikit-image in float64, on frames the golden has not seen."
    from skimage.metrics import structural_similarity
    gen = np.random.default_rng(1)
    truth = gen.integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    other = np.clip(truth + gen.normal(0, 30, truth.shape), 0, 255).astype(np.uint8)
    expected = [structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=0)
                for a, b in zip(other, truth)]
    np.testing.assert_allclose(ssim_frames(other, truth), expected, atol=1e-6)
