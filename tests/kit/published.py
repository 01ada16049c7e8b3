"""The record of a subject that was never trained, for tests of what is published of it."""

PUBLISHED = {
    "subject": "rex",
    "class": "dog",
    "identifier": "srx",
    "caption": "a photo of srx dog",
    "steps": 3,
    "seed": 0,
    "base": "some/base",
    "base_digest": "0" * 64,
    "data_digest": "1" * 64,
    "run": "2" * 64,
    "dbtrain": "0",
}
