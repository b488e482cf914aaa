"""Point guidance: a coloured surface cloud from the kept photos, and its pictures at other cameras.

Providers (`s2d.guidance.providers`) make the cloud: `mvs` from the photos, `points` from a file that the user has.
`render_cloud` draws it.
"""
