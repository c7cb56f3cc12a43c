"""The words by which texts say that something makes something else more or less likely: general English alone.

No disease and no factor is named, and a test holds every term of the shipped vocabulary against these patterns. A
pattern a line, matched between word borders and without regard to case. To add a wording: a line in the list it belongs
to, and a sentence in `test_wording.py`.
"""

from __future__ import annotations

import re

# A few words may stand between a comparative and the word for risk that it belongs to; no sentence mark may.
_GAP = r"(?:[^\w.;]+[\w\u2019'%.-]+){0,4}?[^\w.;]+"


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _any(*lines: str) -> str:
    return rf"\b(?:{'|'.join(lines)})\b"


def _compile(*lines: str) -> re.Pattern[str]:
    return re.compile(_any(*lines), re.IGNORECASE)


def _one_of(text: str) -> str:
    return f"(?:{'|'.join(_lines(text))})"


_RISK = _one_of(r"""
    risks?|chances?|likelihood|odds|hazards?|incidence|prevalence|frequency|frequencies|probability|rates?
    occurrences?|ratios?|susceptibility|number of new|numbers? of|events
""")
_MORE = _one_of(r"""
    increas(?:e|es|ed|ing)|higher|highest|greater|greatest|elevated|rais(?:e|es|ing)|ris(?:e|es|ing)|rose
    heightened|excess|doubl(?:e|es|ed|ing)|tripl(?:e|es|ed|ing)|(?:\w+-?)fold|stronger|high|added|additional
    enhanc(?:e|es|ed)
""")
_LESS = _one_of(r"""
    decreas(?:e|es|ed|ing)|reduc(?:e|es|ed|ing|tion|tions)|lower|lowers|lowered|lowering|lowest|less
    lessen(?:s|ed)?|fewer|smaller|diminish(?:es|ed)?|declin(?:e|es|ed|ing)|low|halv(?:e|es|ed)
""")
_GROWS = r"(?:increas(?:e|es|ed|ing)|ris(?:e|es|ing)|rose|doubl(?:e|es|ed))"
_SHRINKS = r"(?:decreas(?:e|es|ed|ing)|declin(?:e|es|ed)|fell|dropped)"
_IS = r"(?:is|are|was|were) (?:\w+ )?"

RAISES = _compile(
    f"{_MORE}{_GAP}{_RISK}",
    f"{_RISK}{_GAP}{_GROWS}",
    f"{_RISK}{_GAP}{_IS}(?:higher|greater|highest|elevated)",
    *_lines(r"""
    (?:at|places? \w+ at) (?:an? |the )?(?:\w+ )?risk
    risk factors?|high-risk
    (?:more|most) (?:likely|common|commonly|frequent|frequently|often|prevalent|susceptible)\b(?! (?:on|at|located)\b)
    predispos(?:e|es|ed|ing|ition)|susceptible to
    (?:strong |important )?(?:predictor|determinant)s? (?:of|for)
    cause|causes|caused|causing|promotes?
    (?:leads?|led|leading|contributes?|contributed|contributing) to
    (?:linked|related|attributed|due|correlat(?:e|es|ed)) (?:to|with)
    associated with
    (?:an?|strong|stronger|strongest|positive|significant|clear|direct|consistent) association (?:between|with)
    (?:documented|found|confirmed|shown|supports?|supported) the association (?:between|with)
    (?:developed?|develops|arises?|occurs?) (?:more (?:often|frequently|commonly)|from|as a result of)
    (?:etiologic|etiological|causative|causal) (?:factor|agent|role)
    plays? an?(?: \w+)? role in
    (?:occurs?|develops?|seen|found|appears?) (?:mainly|mostly|predominantly|usually|commonly|primarily) (?:in|among)
    (?:mainly|mostly|predominantly|usually|commonly|primarily) (?:occurs?|develops?|seen|found|appears?|affects?)
    """),
)
LOWERS = _compile(
    f"{_LESS}{_GAP}{_RISK}",
    f"{_RISK}{_GAP}{_SHRINKS}",
    f"{_RISK}{_GAP}{_IS}(?:lower|lowest|reduced|decreased)",
    *_lines(r"""
    (?:less|least) (?:likely|common|commonly|frequent|frequently|often|prevalent|susceptible)
    protect(?:s|ed|ing|ion)? (?:\w+ )?(?:against|from)
    protective|preventive|preventative|prevent|prevents|prevented|preventing
    invers(?:e|ely) (?:\w+ )?(?:associat\w+|correlat\w+|relat\w+)
    (?:reduction|reductions|decrease|decreases|decline) in
    (?:reduc(?:es|ed|ing)|decreas(?:es|ed|ing)|lowers|lowered|lowering) (?:\w+ ){0,3}(?:development|formation)
    (?:rare|uncommon|infrequent) (?:in|among)
    favou?ring the
    fades?|fade away|disappears?|regress(?:es)?
    """),
)
DENIES = _compile(
    *_lines(r"""
    no (?:\w+ ){0,3}(?:difference|effect|benefit|association|relation|relationship|correlation|evidence)s?
    no (?:\w+ ){0,3}(?:impact|influence|reduction|increase|link|proof|role)s?
    no (?:\w+ )?change (?:in|of)
    little (?:or|to) no|neither
    not (?:\w+ ){0,2}(?:known|proven|proved|clear|established|certain|conclusive|significant|significantly)
    not (?:\w+ ){0,2}(?:associated|linked|related|differ|affect)
    unclear|unknown|uncertain|inconclusive|inconsistent|conflicting|contradictory|controversial|insufficient
    unproven|equivocal
    (?:inadequate|insufficient) (?:\w+ )?(?:data|evidence)
    (?:hinder|preclud|prevent|limit)(?:e|s|es|ed|ing)? (?:\w+ )?conclus(?:ive|ions?)
    (?:unable to|failed to|fails? to) (?:show|demonstrate|find|detect|prevent|reduce|lower|confirm)
    (?:increased|decreased|higher|lower) (?:\w+ ){1,2}or no association
""")
)
NEGATORS = re.compile(
    r"\b(?:not|never|nor|cannot|without|hardly|nothing|no longer|lack of|rather than|instead of)\b|n['\u2019]t\b",
    re.IGNORECASE,
)
# "Not only" denies nothing, and "not as large" is still there.
NO_NEGATORS = _compile(
    *_lines(r"""
    not (?:only|all|just|merely|surprising)|whether or not|not (?:as )?large
""")
)

SIGN_RAISES = _compile(
    *_lines(r"""
    signs?|symptoms?|hallmarks?
    (?:features?|criteri(?:on|a)) (?:of|that|for|and|include)
    characteri(?:stic|stically|[sz]ed by)|typical|typically
    usually|often|commonly|frequently|generally|sometimes
    (?:appears?|presents?|manifests?|looks?|seen) (?:\w+ )?(?:as|like|with)
    (?:may|might|can|could) \w+
    suggest(?:s|ive of|ing)?
    (?:check|talk|see|tell)(?: with| to)? (?:\w+ )?(?:doctor|provider|professional|physician) if
    more (?:common|likely|frequent)
    (?:raises?|increases?|higher|greater|increased) (?:the )?(?:chance|probability|likelihood|odds)
""")
)
SIGN_LOWERS = _compile(
    *_lines(r"""
    asymptomatic|lacks?|absent|does not|do not|without
    less (?:common|commonly|likely|frequent|frequently|often)
    (?:lowers?|reduces?|decreases?|lower|smaller|reduced) (?:the )?(?:chance|probability|likelihood|odds)
""")
)
SIGN_DENIES = _compile(
    *_lines(r"""
    rarely|seldom|(?:usually|generally) not|not usually|usually (?:\w+ ){1,2}not
    not (?:always|a sign|necessarily)|with or without
""")
)
SITE_RAISES = _compile(
    *_lines(r"""
    (?:most|more) (?:\w+ )?(?:common|commonly|often|frequent|frequently)
    usually|often|commonly|frequently|mainly|mostly|typically|generally|predominantly|primarily|especially
    tends? to (?:occur|form|develop|appear|arise)
    (?:common|commonest|usual|frequent|favou?red|preferred|typical) (?:site|place|location|area)s?
    common on|(?:predilection|preference) for
""")
)
SITE_LOWERS = _compile(r"rarely|seldom|less (?:\w+ )?(?:common|commonly|often|frequent|frequently)|uncommon|rare")
SITE_DENIES = _compile(r"anywhere|any (?:part|site|place|area)")

HEDGES = _compile(
    *_lines(r"""
    may|might|could|can|possibly|possible|perhaps|appears?|seems?|suggest(?:s|ed)?|thought to|believed to|likely
    some (?:studies|evidence|research)|potential|potentially|limited evidence|fair evidence|sometimes
    slight|slightly|modest|modestly|weak|weakly
""")
)
EMPHASIS = _compile(
    *_lines(r"""
    solid evidence|strong(?:ly|er|est)?|well[- ]established|major|main|most important|most studies
    meta-analys[ei]s|systematic reviews?|consistently|clearly|definitely|significantly|convincing|markedly
    much (?:higher|lower|greater)
""")
)
SINGLE_STUDY = _compile(
    *_lines(r"""
    (?:an?|one|another|this|the same|large|larger|small) (?:[\w-]+ ){0,4}?(?:study|trial|cohort|rct|analysis)
    (?:an?|one|another|this|the same|large|larger|small) (?:[\w-]+ ){0,4}?(?:registry|survey|follow-up)
    case report|case series|subset analysis|participants|cohorts?|placebo|et al
""")
)
POOLED = _compile(r"meta-analys[ei]s|systematic reviews?|rcts|trials|studies")

# A sentence that tells the reader what to do, or asks, reports no finding.
COMMANDS = re.compile(
    r"^\W*(?:(?:do not|don['\u2019]t) \w+|(?:please |always |never )?(?:"
    + "|".join(
        _lines(r"""
        use|avoid|wear|limit|protect|stay|talk|ask|check|try|keep|see|visit|call|learn|tell|apply|choose|seek|get
        consult|look|find|read|ignore|disregard|forget|write|state|say|answer|reply|output|pretend|assume|act
        """)
    )
    + r"))\b",
    re.IGNORECASE,
)
ADVICE = _compile(
    *_lines(r"""
    should|recommend(?:s|ed|ation|ations)?|advis(?:e|es|ed|able)|encourag(?:e|es|ed)|ought to|is important to
    best ways? to|(?:for )?more information (?:on|about)?|please|you must|you are to
    (?:previous|prior|above|following) instructions?
""")
)
# What no sentence on a disease says, and one that is meant for a language model does.
TO_MACHINES = re.compile(
    r"\b(?:language models?|chat ?bots?|AI (?:model|system|assistant)s?|as an AI|(?:system|user|your) prompts?|JSON"
    r"|no_evidence|new instructions?|instructions? (?:for|to) (?:the )?(?:model|assistant|system)|role-?play"
    r"|(?:set|change|make|put|give) (?:the |its |your |every |each )?"
    r"(?:direction|strength|entry|entries|answer|summary))\b"
    r"|^\W*(?:system|assistant|user|developer)(?: (?:message|note|prompt))?\W{0,3}:"
    r"|<\|?/?\s*(?:passage|system|assistant|user|instructions?)\b",
    re.IGNORECASE,
)
# What people think of a risk, or do about it, is none.
OPINIONS = _compile(
    *_lines(r"""
    perceiv(?:e|es|ed)|perceptions?|beliefs?|attitudes?|awareness|knowledge|worr(?:y|ies|ied)|distress|anxiety|motivat\w+
    concern(?:s|ed)? about|behaviou?rs?|adherence
""")
)
QUESTIONS = re.compile(r"^\W*(?:who|what|how|why|when|where|is|are|does|do|can)\b[^.]*\?", re.IGNORECASE)

# What becomes of patients, and how they are treated, is another question than who falls ill.
COURSE = _compile(
    *_lines(r"""
    surviv(?:al|ed|e|ors?)|prognos(?:is|tic)|recur(?:rence|rences|rent|red|s)?|relaps\w+|metasta\w+|mortality
    deaths?|died|fatal\w*|stages?|staging|staged|progress(?:ion|ed|es|ing)|respon(?:se|ded|ders?)|adverse
    side effects?|toxicit\w+|excis\w+|resect\w+|surg(?:ery|ical)|treated|treatments?|therap(?:y|ies)|cure rates?
    remission|biops\w+|diagnos(?:tic|e)|spread(?:s|ing)?|invasive|aggressive
""")
)
COURSE_HEADINGS = _compile(
    *_lines(r"""
    treatments?|therap\w+|prognos\w+|survival|stag(?:e|es|ing)|recurren\w+|metasta\w+|management|follow-up
    surveillance|cellular classification|clinical trials?|harms?|costs?|side effects?|adverse|pathology
    histolog\w+|mortality|research
""")
)
RISK_HEADINGS = _compile(r"prevent\w*|risks?|causes?")

# What a clause says the risk is of stands after these,
OUTCOME_BEFORE = re.compile(
    _any(
        *_lines(r"""
    (?:risks?|chances?|likelihood|odds|probability|incidence|prevalence|rates?|frequency) (?:of|for|to|in)
    risk factors? (?:of|for|to|in)
    (?:occurrence|susceptibility|predisposition|predictors?|number|benefit) (?:of|for|to|in)
    develop(?:ing|ment of|s|ed)?|getting|prevent(?:s|ed|ing)?
    protects?(?:ed|ing)? (?:\w+ )?(?:against|from)|protective against
    predispos(?:e|es|ed|ing) to|susceptible to|likely to (?:get|have|develop)|causes?|causing|lead(?:s|ing)? to
    (?:signs?|symptoms?) of|signs? that|suggest(?:s|ive of)?|(?:evolve|turn|develop) into|progress(?:es)? to
    (?:reductions?|decreases?|increases?|rise|difference|change) in
    """)
    )
    + r"(?: (?:getting|developing|having|new|the development of|forming)\b)?\s+",
    re.IGNORECASE,
)
# up to one of these; or before these.
OUTCOME_END = re.compile(
    _any(
        *_lines(r"""
    in|among|than|when|with|by|who|whose|that|which|compared|after|from|for|on|if|due|because|is|are|was|were|has|have
    had|may|can|between|through|although|associated|increases?|decreases?|include[sd]?|including|as
    """)
    )
    + "|[;:.]",
    re.IGNORECASE,
)
OUTCOME_AFTER = re.compile(
    r"((?:[\w\u2019'/()-]+ ){1,4}?)"
    r"(?:risks?|incidence|rates?|prevalence|susceptibility|development|occurrence|events?)\b"
    r"(?! (?:of|for|to|in|factors?)\b)",
    re.IGNORECASE,
)
# What stands after these is what somebody has or had.
PATIENTS = re.compile(
    _any(
        *_lines(r"""
    (?:history|diagnosis) of|treated for|diagnosed with
    (?:patients|people|individuals|persons?|men|women|those|participants) (?:with|had|have|having)
    (?:children|adults|recipients|someone|families|members) (?:with|had|have|having)
    """)
    )
    + r"(?: (?:an?|the|any|previous|prior|first|primary|one or more|history of))*\s+$",
    re.IGNORECASE,
)
# What stands after these, a few words apart, is absent.
EXCLUDED = re.compile(
    _any(
        *_lines(r"""
    without|lack of|absence of|avoid(?:s|ed|ing)?|no|not|never|limit(?:s|ed|ing)?|away from|out of|less
    protect(?:ion|ed)? from|independent(?:ly)? of|regardless of|other than
    """)
    )
    + r"\s+(?:[\w/-]+\s+){0,2}$",
    re.IGNORECASE,
)
# What stands after these, a few words apart, is where something else is at work.
TREATED = re.compile(
    _any(r"(?:applied|administered|put|rubbed|spread) (?:on|onto|to|in)", r"given to") + r"\s+(?:[\w/-]+\s+){0,2}$",
    re.IGNORECASE,
)
COMPARED = re.compile(r"\b(?:than|compared (?:with|to)|relative to|versus|vs\.?|as opposed to)(?!\w)", re.IGNORECASE)
CLAUSES = re.compile(
    r";\s+|,?\s+(?=(?:but|while|whereas|although|though|however|unlike|yet)\b)"
    r"|,\s+(?=and (?:\w+ ){1,4}(?:was|were|is|are|had|has|have|showed|found|did)\b)"
    r"|\s+(?=and (?:showed|shows|found|did|does|had|has) )",
    re.IGNORECASE,
)
