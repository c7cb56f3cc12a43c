"""prima_ray: diagnosis from images and clinical metadata, at cluster scale.

Nothing is imported here, so that ``import prima_ray`` costs nothing and needs neither Ray nor DeepSpeed.
Read the packages from the top: ``cli`` and ``stages`` say what the product does; ``base`` is the ground floor.
"""

__version__ = "0.1.0"
