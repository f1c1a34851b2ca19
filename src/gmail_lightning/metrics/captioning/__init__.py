"""The metrics of captions: the words they share with references, and the Java tools of COCO's own evaluation."""
