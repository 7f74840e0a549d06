"""Latency models from measurements on the target GPU: ``cli.py`` is the command, ``measure.py`` a whole calibration.

``bench/`` times operators, ``fit.py`` and ``compose.py`` make tables of them, ``profile/`` keeps them, ``importers/``
read other projects' measurements, ``execute/`` is the real engine that judges the simulator. The only place for torch.
"""
