"""MoCo v1, v2 and v3: momentum contrast (arXiv 1911.05722, 2003.04297, 2104.02057)."""
