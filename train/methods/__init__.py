"""The methods. A new one is one new module here that says ``METHOD`` and ``OPTIONS``; see :mod:`train.method`."""
