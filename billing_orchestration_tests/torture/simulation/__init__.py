"""Sixty days of a small subscription service, played from a seed, with everything that may go wrong, and a judge.

    python -m billing_orchestration_tests.torture.simulation --seed 7            one seed
    python -m billing_orchestration_tests.torture.simulation --seed 7 --story    with everything that happened
    python -m billing_orchestration_tests.torture.simulation --rounds 40         seeds 1 to 40 on two cores

The jobs' own code runs, on a real PostgreSQL and the sandbox provider's real rules; time is a parameter. It is driven
by events: a matching tick is run when something that it could see has changed, and a few times a day at random. The
ticks in between, every two minutes, would have found nothing; all they leave behind is their watermark, which the
simulation writes for them.

A seed draws the story, down to which of a run's threads goes on at each step (`threads`): played again, it tells the
same. Seeds whose number is divisible by 10 talk HTTP, those divisible by 5 send several charges at a time.

    story        the days, in order             customers, successes, operators, outages    what happens on them
    runs, ticks  our own runs                   process, wire, threads                      what may befall a run
    world        the installation, its clocks   oracle                                      the judge
"""
