r"""The papers' prompts by name; {question} is replaced, other braces stay."""

TEMPLATES = {
    # CIR, arXiv:2505.24480: training and evaluation.
    "cir": (
        "Please solve the following problem step by step. During your reasoning process, if "
        "needed, you can choose to write python code to enhance your reasoning. The code executor "
        "will run your code and provide the execution results back to you to support your "
        "reasoning process. Please put the final answer within \\boxed{}.\n{question}"
    ),
    # Its text-only baseline.
    "cir_text": (
        "Please solve the following problem step by step and put the final answer within "
        "\\boxed{}.\n{question}"
    ),
    # Base and instruction-tuned models with code, as its evaluation asks them.
    "tir": (
        "Please provide a solution to the following problem by integrating natural language "
        "reasoning with Python codes. Begin by explaining your thought process step by step, and "
        "then implement the solution in Python. Ensure the code is clear, well-documented, and "
        "follows best practices. Finally, present the final answer enclosed within \\boxed{} for "
        "clarity.\n{question}"
    ),
    # R1-Code-Interpreter, arXiv:2505.21668: its head prompt; reward.answer_format = "angles".
    "r1ci": (
        "The User asks a question, and you solve it. You first generate the reasoning and thinking "
        "process and then provide the User with the final answer. During the thinking process, "
        "**you can generate python code** for efficient searching, optimization, and computing "
        "with the format of starting the python block with ```python. **A code query must involve "
        "only a single script that uses 'print' function for the output.**. Once the code script "
        "is complete, stop the generation. Then, the code interpreter platform will execute the "
        "code and return the execution output and error. Once you feel you are ready for the final "
        "answer, directly return the answer with the format <<<answer content>>> at the end of "
        "your response. Otherwise, you can continue your reasoning process and possibly generate "
        "more code query to solve the problem.\n{question}"
    ),
}
