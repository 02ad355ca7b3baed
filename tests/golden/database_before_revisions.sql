CREATE TABLE schema_version (
    version INTEGER
);
CREATE TABLE sweeps (
    sweep_id VARCHAR(96) NOT NULL,
    name VARCHAR(64) NOT NULL,
    state VARCHAR(16) NOT NULL,
    spec JSON NOT NULL,
    spec_hash VARCHAR(64) NOT NULL,
    dataset VARCHAR(256) NOT NULL,
    dataset_fingerprint VARCHAR(64) NOT NULL,
    created_at FLOAT NOT NULL,
    ended_at FLOAT,
    mlflow_run_id VARCHAR(64),
    PRIMARY KEY (sweep_id)
);
CREATE TABLE trials (
    trial_id VARCHAR(128) NOT NULL,
    sweep_id VARCHAR(96) NOT NULL,
    number INTEGER NOT NULL,
    state VARCHAR(16) NOT NULL,
    reason TEXT NOT NULL,
    config JSON NOT NULL,
    trial_config JSON,
    planned_iterations INTEGER NOT NULL,
    planned_epsilon FLOAT,
    charged_iterations INTEGER NOT NULL,
    mlflow_run_id VARCHAR(64),
    PRIMARY KEY (trial_id),
    UNIQUE (sweep_id, number),
    CHECK (charged_iterations >= 0),
    CHECK (charged_iterations <= planned_iterations),
    FOREIGN KEY(sweep_id) REFERENCES sweeps (sweep_id)
);
CREATE INDEX ix_trials_sweep_id ON trials (sweep_id);
CREATE TABLE attempts (
    attempt_id VARCHAR(32) NOT NULL,
    trial_id VARCHAR(128) NOT NULL,
    number INTEGER NOT NULL,
    start_step INTEGER NOT NULL,
    charged_step INTEGER NOT NULL,
    worker VARCHAR(256) NOT NULL,
    started_at FLOAT NOT NULL,
    ended_at FLOAT,
    PRIMARY KEY (attempt_id),
    UNIQUE (trial_id, number),
    FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE outbox (
    message_id INTEGER NOT NULL,
    sweep_id VARCHAR(96) NOT NULL,
    trial_id VARCHAR(128),
    kind VARCHAR(16) NOT NULL,
    payload JSON NOT NULL,
    created_at FLOAT NOT NULL,
    delivered_at FLOAT,
    PRIMARY KEY (message_id),
    FOREIGN KEY(sweep_id) REFERENCES sweeps (sweep_id),
    FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE INDEX ix_outbox_delivered_at ON outbox (delivered_at);
CREATE TABLE reports (
    trial_id VARCHAR(128) NOT NULL,
    step INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    reported_at FLOAT NOT NULL,
    charged_iterations INTEGER NOT NULL,
    epsilon FLOAT,
    eval_accuracy FLOAT,
    eval_loss FLOAT,
    PRIMARY KEY (trial_id, step, attempt),
    FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
