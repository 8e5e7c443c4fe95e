"""TODO"""



import run


def read_judgments(settings_class, argv, what, fields, by, key, complete=lambda row: None):
    """(settings, {values of the columns `by`: rows as `read_rows` gives them}) of all the files behind --judgments.
    complete(row) may fill in columns that older files lack.
    Raises UserError for two judges, or two rows with the same values of `by` and `key`: one of them would count twice.
    """
    if argv.count("--judgments") > 1:
        raise run.UserError("--judgments is given twice; name all the files after one: --judgments A B C")
    words, paths = [], []
    for word in argv:       # a flag of run.parse has one value: `--judgments A B C` hands over A, the rest is kept here
        more = words[-2:-1] == ["--judgments"] and not word.startswith("--")
        (paths if more else words).append(word)
    s = run.parse(settings_class, words, what)
    groups, judges, seen = {}, set(), set()
    for path in filter(None, [s.judgments, *paths]):
        for where, row in read_rows("--judgments", path, fields):
            judges.add(str(row["judge"][0] if isinstance(row["judge"], list) and row["judge"] else row["judge"]))
            if len(judges) > 1:
                raise run.UserError(f"--judgments {path}, {where}: a second judge, {' beside '.join(sorted(judges))}; "
                                    "give the judgments of one judge at a time")
            complete(row)
            name, this = tuple(row[k] for k in by), tuple(row[k] for k in (*by, *key))
            if this in seen:
                raise run.UserError(f"--judgments {path}, {where}: a second judgment of {', '.join(map(str, this))}; "
                                    f"keep one for each {', '.join((*by, *key))}")
            seen.add(this)
            groups.setdefault(name, []).append((f"{path}, {where}", row))
    if not groups:
        raise run.UserError("--judgments is needed; give one or several of the benchmark's model_judgment .jsonl files")
    return s, groups
