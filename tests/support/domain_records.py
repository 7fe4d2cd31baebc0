"""Small records with the fields of each dataset that a domain loader reads.

The fields are those that the datasets' cards and the code that loads them show.
"""

from __future__ import annotations

from collections.abc import Mapping

Record = Mapping[str, object]

TURNS = [
    {
        "role": "user",
        "content": "How do bees find their way back to the hive?",
        "language": "English",
        "toxic": False,
        "redacted": False,
    },
    {
        "role": "assistant",
        "content": "By the sun and by landmarks.",
        "language": "English",
        "toxic": False,
        "redacted": False,
    },
]
OLYMPIC = {
    "prompt": "",
    "figure_urls": None,
    "answer_type": "NV",
    "unit": None,
    "language": "EN",
    "modality": "text-only",
}

RECORDS: Mapping[str, list[Record]] = {
    "load_math": [
        {
            "problem": "What is $1+1$?",
            "level": "Level 1",
            "type": "Prealgebra",
            "solution": "It is $\\boxed{2}$.",
        },
        {
            "problem": "How many primes are even?",
            "level": "Level 5",
            "type": "Number Theory",
            "solution": "Only 2, so $\\boxed{1}$.",
        },
    ],
    "load_numinamath": [
        {
            "source": "synthetic_math",
            "problem": "Solve $x+2=5$.",
            "solution": "So $x=3$.",
            "messages": [{"content": "x", "role": "user"}],
        }
    ],
    "load_olympic_arena": [
        {
            "id": "Math_1",
            "problem": "Find $2^5$.",
            "answer": ["32"],
            "solution": "It is 32.",
            "subject": "Math",
            **OLYMPIC,
        },
        {
            "id": "Phy_1",
            "problem": "What does a scale measure?",
            "answer": ["force"],
            "solution": "A force.",
            "subject": "Physics",
            **OLYMPIC,
        },
        {
            "id": "Phy_2",
            "problem": "一",
            "answer": ["x"],
            "solution": "x",
            "subject": "Physics",
            **OLYMPIC,
            "language": "ZH",
        },
    ],
    "load_theoremqa": [
        {
            "Question": "Is the sum of two odd numbers even?",
            "Answer": "True",
            "Answer_type": "bool",
            "Picture": None,
        },
        {"Question": "See the picture.", "Answer": "1", "Answer_type": "integer", "Picture": "data"},
    ],
    "load_scieval": [
        {
            "question": "What carries oxygen in blood?\n\nA. Iron\nB. Haemoglobin\n\nAnswer:",
            "answer": ["B"],
            "type": "multiple-choice",
            "category": "biology",
            "topic": ["cells"],
            "ability": "Base Knowledge",
            "task_name": "SocraticQA",
            "id": "1",
            "prompt": "",
        }
    ],
    "load_olympiad_bench": [
        {
            "id": 1606,
            "question": "Prove that $n^2 \\ge n$.",
            "solution": ["For $n \\ge 1$ multiply by $n$.", "Another."],
            "final_answer": None,
            "context": None,
            "modality": "Text-only",
            "difficulty": "Competition",
            "question_type": "Theorem proof",
            "subject": "Math",
        },
        {
            "id": 1,
            "question": "How high does it rise?",
            "solution": ["5 m"],
            "final_answer": ["5"],
            "context": "A ball is thrown up at 10 m/s.",
            "modality": "Text-only",
            "difficulty": "CEE",
            "question_type": "Open-ended",
            "subject": "Physics",
        },
    ],
    "load_jeebench": [
        {
            "subject": "chem",
            "description": "JEE Adv 2016 Paper 1",
            "gold": "B",
            "index": 21,
            "type": "MCQ",
            "question": "Which is noble?\n(A) N\n(B) Ne",
        },
        {
            "subject": "math",
            "description": "JEE Adv 2016 Paper 1",
            "gold": "5",
            "index": 40,
            "type": "Integer",
            "question": "What is 2+3?",
        },
    ],
    "load_agieval": [
        {
            "query": "Q: What is 3·3? Answer Choices: (A)6 (B)9\nA: Among A through B, the answer is",
            "choices": ["(A)6", "(B)9"],
            "gold": [1],
        }
    ],
    "load_gpqa_extended": [
        {
            "Question": "What binds nucleons?",
            "Correct Answer": "The strong force",
            "Incorrect Answer 1": "Gravity",
            "Incorrect Answer 2": "Friction",
            "Incorrect Answer 3": "Light",
            "Explanation": "It outweighs the repulsion of the protons.",
            "High-level domain": "Physics",
        }
    ],
    "load_livecodebench": [
        {
            "question_title": "A. Sum",
            "question_content": "Read two numbers and print their sum.",
            "starter_code": "",
            "difficulty": "easy",
            "platform": "atcoder",
        },
        {
            "question_title": "B. Path",
            "question_content": "Print the longest path.",
            "starter_code": "def f():",
            "difficulty": "medium",
            "platform": "leetcode",
        },
    ],
    "load_quant": [
        {"Question": "Two coins, one head seen: is the other a head?", "Answer": "With probability 1/3."}
    ],
    "load_statsqual": [
        {"question": "Show that the mean is unbiased.", "solution": "By linearity of expectation."}
    ],
    "load_xword": [
        {
            "instruction": "You solve cryptic crosswords.",
            "input": "### Clue: Noticed minor changes (3)",
            "output": "### Answer: SAW",
        }
    ],
    "load_usaco": [
        {
            "id": "1_bronze",
            "question": " Count the cows. ",
            "difficulty": "bronze",
            "input_output": "{}",
            "samples": None,
        },
        {
            "id": "2_gold",
            "question": "Order the cows.",
            "difficulty": "gold",
            "input_output": "{}",
            "samples": None,
        },
    ],
    "load_curated_thoughts": [
        {
            "problem": "Halve 8.",
            "solution": "4.",
            "answer": "4",
            "generations": ["<think>8/2</think> 4"],
            "source": "olympiads",
        },
        {
            "problem": "Double 8.",
            "solution": "16.",
            "system": "s",
            "generated_token_count": 9,
            "correct": True,
            "conversations": [
                {"from": "user", "value": "Double 8."},
                {"from": "assistant", "value": "Adding 8 and 8 gives 16."},
            ],
        },
        {
            "problem": "Reverse a list.",
            "deepseek_reasoning": "A slice does it.",
            "deepseek_solution": "a[::-1]",
            "ground_truth_solution": None,
            "domain": "code",
            "source": "taco",
            "test_cases": "",
            "starter_code": "",
        },
    ],
    "load_wildchat": [
        {
            "conversation_id": "a",
            "model": "gpt-4",
            "conversation": TURNS,
            "turn": 1,
            "language": "English",
            "toxic": False,
            "redacted": False,
        },
        {
            "conversation_id": "b",
            "model": "gpt-4",
            "conversation": TURNS[:1],
            "turn": 1,
            "language": "English",
            "toxic": True,
            "redacted": False,
        },
    ],
}
