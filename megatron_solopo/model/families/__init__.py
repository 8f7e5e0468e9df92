"""Model families: what a Hugging Face config means for Megatron Core, and which tensors form which parameter.

A family is one file. It is looked up by the config's ``model_type``; an unknown one is refused by name.
"""
