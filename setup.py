# SPDX-License-Identifier: Apache-2.0
"""Finds the packages; everything else is in pyproject.toml.

`launch` is too common an import name to claim (ROS ships one): the folder installs as `specdist_launch`.
"""

from setuptools import find_packages, setup

launch = ["specdist_" + name for name in find_packages(include=["launch", "launch.*"])]
setup(
    packages=find_packages(include=["specdist", "specdist.*"]) + launch,
    package_dir={"specdist_launch": "launch"},
    package_data={"specdist": ["py.typed"], "specdist.run.report": ["page.html.j2"]},
)
