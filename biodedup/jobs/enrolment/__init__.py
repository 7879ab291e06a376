"""Bulk enrolment: with decisions (`enroll-batch`), and without a search (`load`)."""
