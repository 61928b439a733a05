"""Which classes of Transformers have which kind of head."""


def class_names(*mappings: str) -> set[str]:
    """The names of the classes in mappings of ``transformers.models.auto.modeling_auto``.

    Args:
        mappings: their names, as "MODEL_FOR_MASKED_LM_MAPPING_NAMES"; unknown ones hold nothing.
    """
    from transformers.models.auto import modeling_auto  # not while transformers is being imported

    names: set[str] = set()
    for mapping in mappings:
        for value in getattr(modeling_auto, mapping, {}).values():
            names |= {value} if isinstance(value, str) else set(value)
    return names
