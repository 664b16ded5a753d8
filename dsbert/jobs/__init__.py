"""What a run will take, and SLURM jobs that pre-train and requeue themselves until they are done.

capacity/      `dsbert plan`: what a run will need and take, before it begins
submit         `dsbert submit`: what is refused at once, and the job that is left
job_script     the text of the job
job_queue      what SLURM and the run directory say of jobs on the same run
"""
