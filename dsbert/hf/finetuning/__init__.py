"""`dsbert finetune`: sparse and dense models on tasks, by transformers' Trainer.

task_file           what a task's file declares; benchmark_tasks.py GLUE and SQuAD by name
task_tables         a task's rows and classes, and what is wrong with them
sequence_tasks      classification and regression of texts and pairs; token_tasks.py of words; answer_tasks.py answers
                    that stand in a text; class_task.py what the first two have alike
task_metrics        the metrics of all of them
starting_model      a model with a new head, out of a run, an export or a directory of transformers
finetune_settings   what is asked for, and what of it Trainer is told
trainer_callbacks   mask updates, whole checkpoints, signals, lines for people
finetune            all of it in order; result_files.py what it leaves behind
"""
