"""Scenes: pictures of OpenMoji drawings with exact captions, boxes, masks, questions and answers, made on demand.

from mmjax.data.scenes.sources import SceneQuestions
questions = SceneQuestions(100_000, "train", seed=0, size=96)
questions[0]          # {"image": uint8 [96, 96, 3], "text": "Is there a red cat?", "answers": ("yes",), ...}

sources      what a pipeline reads: captions, masks, boxes, referring expressions, questions, statements about two
             images, documents, clips, conversations
files        the same in the published files' formats
close_ups    pictures of one or two large things, for networks that learn in a minute
splits       held-out sprites, pairs of sprites and counts
sprites      the 128 drawings, eight colours and the words of signs
world        what is in a scene and where it is; rendering: its pixels; language: its captions
questions, two_images, sequences     questions, statements and stories about scenes
"""
