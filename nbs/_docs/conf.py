"""Sphinx settings of the documentation site. Everything it shows works without a network."""
project = 'talkingface'
author = 'the talkingface developers'
copyright = '2026, the talkingface developers'
extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx_design', 'sphinx_copybutton']
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'gfm'     # tables in outputs
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline', 'deflist']
myst_heading_anchors = 4
html_theme = 'sphinx_book_theme'
html_title = 'talkingface'
html_theme_options = {'show_navbar_depth': 1, 'home_page_in_toc': True, 'use_download_button': False, 'use_fullscreen_button': False,
                      'navbar_persistent': []}
html_static_path = ['_static']
html_css_files = ['site.css']
html_sourcelink_suffix = ''
html_copy_source = False
# MathJax 2 comes from the wheel jupyter_server_mathjax, copied into _static by build.py
myst_update_mathjax = False
mathjax_path = 'mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe'
mathjax_options = {'async': 'async'}
mathjax3_config = None
mathjax2_config = {'tex2jax': {'inlineMath': [['\\(', '\\)']], 'displayMath': [['\\[', '\\]']], 'processClass': 'math|output_area'},
                   'messageStyle': 'none', 'showMathMenu': False,
                   # the wheel holds these fonts only
                   'HTML-CSS': {'scale': 105, 'matchFontHeight': False, 'availableFonts': [], 'imageFont': None, 'preferredFont': None, 'webFont': 'STIX-Web'}}
nb_code_prompt_show = 'Show {type}'
nb_code_prompt_hide = 'Hide {type}'
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type', 'misc.highlighting_failure']
exclude_patterns = ['_site', '_trees', 'jupyter_execute']
