"""Classification data: sources, decoding, transforms, samplers, loaders and generated data sets.

Everything here takes plain values and knows neither configs nor Detectron2. An image passes through:
`sampler.BatchSampler` (which index at which position) -> `sources` (its bytes) -> `decode` (pixels) -> `transforms`
(augmentation, drawn from the seed and the position; `functional` holds the pixel operations) -> `classification`
(batches).
"""
